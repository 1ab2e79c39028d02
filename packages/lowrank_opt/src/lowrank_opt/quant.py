"""Moments in 8 bits: one code per element, one float32 maximum per block of a row.

A block is divided by its largest magnitude; every quotient is replaced by the exactly nearest of 256 values
that lie densest around zero (signed for first moments, unsigned for second ones). The operators of
`kernels_cuda.lowrank` do that; here are the code books and where blocks lie in an optimizer's state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels_cuda.lowrank import adam8bit_step_, dequantize_blockwise, quantize_blockwise
from lowrank_opt.base import Group, State, is_shared, local, work_dtype
from lowrank_opt.sharding import full

MOMENTS = ("exp_avg", "exp_avg_sq")


@functools.cache
def code_book(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """256 sorted float32 values: seven decades, each with twice as many values as the one below, and 0 and 1.

    >>> code_book(True)[[0, 127, 255]], code_book(False)[[0, 255]]
    (tensor([-0.9930,  0.0000,  1.0000]), tensor([0., 1.]))
    """
    if torch.device(device).type != "cpu":
        return code_book(signed).to(device)
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        # other libraries' linspace rounds differently, and the values are part of the format
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def is_quantised(group: Group, elements: int) -> bool:
    """Whether moments of this many elements are kept in 8 bits."""
    return bool(group["state_bits"] == 8 and elements >= group["min_8bit_size"])


def moment_layout(group: Group, shape: tuple[int, ...], row_aligned: bool, shares: Sequence[int] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of the state tensors that hold two moments of `shape`.

    `shares`: how many columns (of a flat tensor: elements) each process has, if several do. Blocks restart with every process; of a
    flat tensor each has room for as many as the first one needs, since a DTensor is cut evenly.
    """
    if not is_quantised(group, math.prod(shape)):
        return dict.fromkeys(MOMENTS, shape)
    rows, columns = shape if row_aligned else (1, math.prod(shape))
    blocks = [math.ceil(part / group["block_size"]) for part in shares or (columns,)]
    maxima = (rows, sum(blocks)) if row_aligned else (max(blocks) * len(blocks),)
    return {name + suffix: size for name in MOMENTS for suffix, size in (("_q", shape), ("_absmax", maxima))}


def zero_moments(layout: dict[str, tuple[int, ...]], like: Tensor, dimension: int = 0) -> State:
    """Moments of zero, laid out by `moment_layout`, for the parameter `like`; shared out along `dimension` where it is."""
    zeros: State = {}
    for name, shape in layout.items():
        code = int((code_book(True) == 0).nonzero()) if name == "exp_avg_q" else 0
        dtype = torch.uint8 if name.endswith("_q") else torch.float32 if name.endswith("_absmax") else work_dtype(like.dtype)
        if not is_shared(like):
            zeros[name] = torch.full(shape, code, dtype=dtype, device=like.device)
        elif shape == tuple(like.shape) and dimension == 0:
            # placed like the parameter, however that is
            zeros[name] = torch.full_like(like, code, dtype=dtype, memory_format=torch.contiguous_format)
        else:
            zeros[name] = full(shape, code, dtype, like, dimension)
    return zeros


class Piece:
    """A parameter's 8-bit moments: those of a row-aligned tensor, or columns of a flat one seen as one row."""

    def __init__(self, state: State, block: int, columns: slice | None = None) -> None:
        self.block = block
        self.codes, self.maxima = [], []
        for name in MOMENTS:
            codes, maxima = local(state[name + "_q"]), local(state[name + "_absmax"])
            if columns is None:
                self.codes.append(codes)
                self.maxima.append(maxima)
            else:
                self.codes.append(codes.view(1, -1)[:, columns])
                self.maxima.append(maxima.view(1, -1)[:, columns.start // block : math.ceil(columns.stop / block)])

    def read(self) -> tuple[Tensor, Tensor]:
        """Both moments in float32."""
        first, second = (
            dequantize_blockwise(codes, maxima, code_book(signed, codes.device), self.block, row_aligned=True)
            for codes, maxima, signed in zip(self.codes, self.maxima, (True, False), strict=True)
        )
        return first, second

    def write(self, first: Tensor, second: Tensor) -> None:
        """Quantise both moments into the state."""
        for codes, maxima, value, signed in zip(self.codes, self.maxima, (first, second), (True, False), strict=True):
            new = quantize_blockwise(value, code_book(signed, value.device), self.block, row_aligned=True, nonzero=not signed)
            codes.copy_(new[0])
            maxima.copy_(new[1])

    def adam_(self, gradient: Tensor, out: Tensor, step: int, group: Group, *, decay: float, alpha: float) -> None:
        """Update both moments with `gradient`, and out <- decay out - alpha N with Adam's normalised step N; out is float32.

        With decay 0, what out held before is not read. `step` is the number of this update, 1 for the first.
        """
        (mq, vq), (m_absmax, v_absmax) = self.codes, self.maxima
        signed, unsigned = code_book(True, gradient.device), code_book(False, gradient.device)
        gradient, out, (b1, b2) = gradient.view(mq.shape), out.view(mq.shape), group["betas"]
        adam8bit_step_(
            gradient,
            mq,
            m_absmax,
            vq,
            v_absmax,
            signed,
            unsigned,
            out,
            b1,
            b2,
            group["eps"],
            step,
            self.block,
            row_aligned=True,
            decay=decay,
            alpha=alpha,
        )
