"""Argument checks of ops, with the one error format: field, value, what is wrong, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor


def fail(field: str, value: object, wrong: str, fix: str) -> NoReturn:
    """Raise the ValueError that all checks share."""
    raise ValueError(f"{field}: {value} {wrong}; {fix}")


def shapes(**tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """Sizes by letter, checked to be the same wherever a letter appears. Tensors that are None are skipped.

    >>> shapes(hidden=(torch.ones(3, 2), "ND"), labels=(torch.ones(3), "N"))
    {'N': 3, 'D': 2}
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    for name, (tensor, letters) in tensors.items():
        if tensor is None:
            continue
        if tensor.dim() != len(letters):
            fail(name, f"shape {tuple(tensor.shape)}", f"has {tensor.dim()} dimensions", f"pass {len(letters)}: {', '.join(letters)}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                fail(
                    name,
                    f"shape {tuple(tensor.shape)}",
                    f"has {letter} = {size} where {origin[letter]} has {sizes[letter]}",
                    f"make {letter} the same",
                )
            origin.setdefault(letter, name)
    return sizes


def dtype(name: str, tensor: Tensor | None, allowed: Sequence[torch.dtype]) -> None:
    """The tensor has one of the allowed dtypes."""
    if tensor is not None and tensor.dtype not in allowed:
        fail(name, tensor.dtype, "is not supported", f"use {' or '.join(str(kind).removeprefix('torch.') for kind in allowed)}")


def same(what: str, **tensors: Tensor | None) -> None:
    """All tensors agree in `what`, "dtype" or "device"."""
    given = [(name, getattr(tensor, what)) for name, tensor in tensors.items() if tensor is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            fail(name, f"{what} {value}", f"differs from {given[0][0]}, which has {given[0][1]}", f"give both the same {what}")


def one_of(field: str, value: str, allowed: Sequence[str]) -> None:
    """The value is one of the allowed words."""
    if value not in allowed:
        fail(field, repr(value), "is not known", f"use {' or '.join(map(repr, allowed))}")


def refuse_second_derivative(op: str) -> None:
    """In the backward of an op."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: create_graph=True is wrong because the op has no second derivative; use kernels_cuda.use('reference')")
