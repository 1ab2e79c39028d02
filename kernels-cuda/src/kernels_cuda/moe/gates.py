"""What the operators of a gate share: their limits, their checks and the rows of logits they are tested with. T tokens, N experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels_cuda import check

MAX_EXPERTS, MAX_SELECTS = 256, 16  # as in ranking.h


def check_rows(k: int, mask: Tensor | None, most: int, **rows_TN: Tensor) -> None:
    """T x N logits, float32 or float64, all alike; 1 <= k <= `most`; a mask of T."""
    check.shapes(**{name: (value, "TN") for name, value in rows_TN.items()}, mask=(mask, "T"))
    for name, value in rows_TN.items():
        check.dtype(name, value, (torch.float32, torch.float64))
    check.same("dtype", **rows_TN)
    check.same("device", **rows_TN, mask=mask)
    if not 1 <= k <= most:
        experts = next(iter(rows_TN.values())).shape[1]
        check.fail("k", k, f"does not fit {experts} experts", f"use 1 to {most}")


def fits(k: int, experts: int) -> bool:
    """Whether the kernels take so many; the reference takes all."""
    return experts <= MAX_EXPERTS and k <= MAX_SELECTS


def real(mask_T: Tensor | None, like_TN: Tensor) -> Tensor:
    """1 for a token that counts and 0 for another, T x 1."""
    return torch.ones_like(like_TN[:, :1]) if mask_T is None else mask_T[:, None].to(like_TN.dtype).ne(0).to(like_TN.dtype)


def rows(dtype: torch.dtype, tokens: int, experts: int, *, seed: int = 0, scale: float = 1.0, distinct: int | None = None) -> Tensor:
    """Random logits; with `distinct` of only so many values, so that some are equal."""
    generator = torch.Generator().manual_seed(tokens + experts + seed)
    if distinct is not None:
        return torch.randint(0, distinct, (tokens, experts), generator=generator).to(dtype)
    return (scale * torch.randn(tokens, experts, generator=generator)).to(dtype)


# sizes at which every operator of a gate is tested, those beyond the kernels' limits too
SIZES: dict[str, dict[str, Any]] = {
    "ordinary": {"tokens": 37, "experts": 16, "k": 4},
    "odd sizes": {"tokens": 19, "experts": 7, "k": 3},
    "one expert of a token": {"tokens": 20, "experts": 8, "k": 1},
    "all experts but one": {"tokens": 9, "experts": 5, "k": 4},
    "idle experts": {"tokens": 3, "experts": 40, "k": 2},
    "as many as there may be": {"tokens": 5, "experts": 256, "k": 16},
    "more than the kernels take": {"tokens": 5, "experts": 300, "k": 17},
    "no tokens": {"tokens": 0, "experts": 4, "k": 2},
    "many slices": {"tokens": 600, "experts": 9, "k": 2},
}


def bits(mask_T: Tensor | None) -> Tensor | None:
    """The mask as kernels read it."""
    return None if mask_T is None else mask_T.ne(0).contiguous()
