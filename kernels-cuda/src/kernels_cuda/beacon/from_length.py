"""What the ops that change the lengths of a memory are timed by."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def from_same_length(op: Callable[..., None]) -> Callable[..., None]:
    """The op, at every call from the length that was given."""

    def run(mem_len: Tensor, **given: Tensor) -> None:
        op(mem_len=mem_len.clone(), **given)

    return run
