"""Shapes to time, and what they are compared with: one step of AdamW on a weight."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.lowrank import adam8bit_step_
from kernels_cuda.lowrank.adam8bit_step_ import reference
from kernels_cuda.lowrank.adam8bit_step_.cases import make
from kernels_cuda.testing import Arguments


def optimizer(kind: Callable[..., Any], **settings: Any) -> Callable[..., None]:
    """Steps of one optimizer on a weight like `out` with the gradient L."""
    made: list[Any] = []

    def step(L: Tensor, out: Tensor, **_: object) -> None:
        if not made:
            weight = torch.nn.Parameter(out.clone())
            weight.grad = L
            made.append(kind([weight], lr=1e-3, **settings))
        made[0].step()

    return step


def bitsandbytes(parameters: list[Tensor], lr: float) -> Any:
    """Its AdamW8bit, imported only where it is timed."""
    return importlib.import_module("bitsandbytes.optim").AdamW8bit(parameters, lr=lr)


BITSANDBYTES, FUSED = "bitsandbytes.optim.AdamW8bit", "torch.optim.AdamW(fused=True)"


def shapes(size: int) -> list[Shape]:
    """A square weight against both optimizers, where they are installed."""
    baselines = {FUSED: optimizer(torch.optim.AdamW, fused=True)}
    if importlib.util.find_spec("bitsandbytes"):
        baselines[BITSANDBYTES] = optimizer(bitsandbytes)

    def arguments() -> Arguments:
        return make(torch.float32, size, size, decay=1 - 1e-5, alpha=1e-3)

    # gradient, weight read and written, codes of two moments read and written, one maximum each per 256
    moved = size * size * (4 + 8 + 4) + size * size // 256 * 16
    return [
        Shape(
            f"{size} x {size}",
            torch.float32,
            arguments,
            adam8bit_step_,
            baseline,
            name,
            0,
            moved,
            {"the reference": reference.adam8bit_step_},
        )
        for name, baseline in baselines.items()
    ]


SHAPES = shapes(2048)
