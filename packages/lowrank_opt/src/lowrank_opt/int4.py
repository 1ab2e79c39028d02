"""Bases in 4 bits: two codes per byte, and a half-precision step and offset for every 256 entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 256
# what a basis called `proj` is kept as
PARTS = ("_q", "_scale", "_zero")


def packed_layout(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that hold a basis of this shape."""
    size = math.prod(shape)
    groups = math.ceil(size / GROUP)
    return {name + part: (length,) for part, length in zip(PARTS, (math.ceil(size / 2), groups, groups), strict=True)}


def pack(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, the even entry in the lower half), steps and offsets (float16) of the flattened values.

    Every group is cut into 15 equal steps from its least to its greatest value; a value gets the nearest.
    """
    flat = values.detach().reshape(-1).float()
    size = len(flat)
    # the last group is filled up with an entry of its own, which changes neither of its ends
    groups = torch.cat([flat, flat[-1:].expand(-size % GROUP)]).view(-1, GROUP)
    zero = groups.amin(dim=1).half()
    # below 0 where equal entries lie under their rounded offset
    scale = ((groups.amax(dim=1) - zero.float()).clamp_min(0) / 15).half()
    step = torch.where(scale > 0, scale.float(), 1.0).unsqueeze(1)
    codes = ((groups - zero.float().unsqueeze(1)) / step).round_().clamp_(0, 15).to(torch.uint8).view(-1)
    codes = codes[: size + size % 2].clone()
    if size % 2:
        codes[-1] = 0
    pairs = codes.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4), scale, zero


def unpack(codes: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The values of `pack`, in float32 and of the given shape.

    >>> values = torch.linspace(-1, 1, 15).view(3, 5)
    >>> float((unpack(*pack(values), (3, 5)) - values).abs().max()) < 0.5 * 2 / 15
    True
    """
    size = math.prod(shape)
    flat = torch.stack((codes & 15, codes >> 4), dim=1).view(-1)[:size].float()
    whole = size // GROUP * GROUP
    flat[:whole].view(-1, GROUP).mul_(scale[: whole // GROUP, None].float()).add_(zero[: whole // GROUP, None].float())
    if whole < size:
        flat[whole:].mul_(scale[-1].float()).add_(zero[-1].float())
    return flat.view(shape)
