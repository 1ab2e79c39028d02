"""Where bases in 4 bits lie in an optimizer's state: codes, and a step and an offset for every 256 entries."""

from __future__ import annotations

import math

GROUP = 256
# what a basis called `proj` is kept as
PARTS = ("_q", "_scale", "_zero")


def packed_layout(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that hold a basis of this shape."""
    size = math.prod(shape)
    groups = math.ceil(size / GROUP)
    return {name + part: (length,) for part, length in zip(PARTS, (math.ceil(size / 2), groups, groups), strict=True)}
