"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda.lowrank.blocks import columns_of


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor, block: int = 256, row_aligned: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """See the public function of the same name; `dtype` is that of `code` if None."""
    dtype = dtype or code.dtype
    if codes.numel() == 0:
        return torch.empty_like(codes, dtype=dtype)
    columns = columns_of(codes, row_aligned)
    maxima = absmax.view(-1, -(-columns // block)).repeat_interleave(block, 1)[:, :columns]
    return (code[codes.long()] * maxima.reshape(codes.shape)).to(dtype)
