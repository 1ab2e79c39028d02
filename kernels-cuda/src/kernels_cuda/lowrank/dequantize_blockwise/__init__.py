"""Values from codes of 8 bits and one maximum per block."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.lowrank.blocks import check_absmax, check_block, check_code, columns_of
from kernels_cuda.lowrank.dequantize_blockwise import binding, reference

__all__ = ["dequantize_blockwise"]


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, code: Tensor, block: int = 256, row_aligned: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """code[codes] times the maximum of each block, in `dtype` and of the codes' shape; `quantize_blockwise` says what blocks are.

    Raises ValueError for shapes, dtypes or devices that do not fit.

    >>> dequantize_blockwise(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([4.0]), torch.linspace(-1, 1, 256))
    tensor([-4.,  4.])
    """
    check.dtype("codes", codes, (torch.uint8,))
    check_block(block)
    check_code("code", code, codes)
    check_absmax("absmax", absmax, codes, block, row_aligned)
    check.same("device", codes=codes, absmax=absmax)
    library = choice.library(binding.OP, codes.device.type)
    if not library or codes.numel() == 0:
        return reference.dequantize_blockwise(codes, absmax, code, block, row_aligned, dtype)
    codes = codes.contiguous()
    values = torch.empty_like(codes, dtype=torch.float32)
    kernels = getattr(torch.ops, library)
    kernels.dequantize_blockwise(codes, absmax.contiguous(), code.contiguous(), values, columns_of(codes, row_aligned), block)
    return values.to(dtype)
