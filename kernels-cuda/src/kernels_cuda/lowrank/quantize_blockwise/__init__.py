"""Codes of 8 bits and one maximum per block, exactly rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.lowrank.blocks import absmax_shape, check_block, check_code, columns_of
from kernels_cuda.lowrank.quantize_blockwise import binding, reference

__all__ = ["quantize_blockwise"]


def quantize_blockwise(
    x: Tensor, code: Tensor, block: int = 256, row_aligned: bool = False, nonzero: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes (uint8, of x's shape) and the largest magnitude of every block (float32).

    A block holds `block` neighbours of the flattened tensor (maxima: one dimension) or, with `row_aligned`, of a row: blocks
    restart at every row and the last one may be short (maxima: rows x blocks). A code is the index of the value in `code`
    (256 float32 values, sorted) that is exactly nearest to x / maximum, the lower one of two equally near. A block of zeros has
    maximum 0 and the code of 0. `nonzero`: a value above 0 never takes code 0, so that a second moment cannot vanish.

    x: float32, bfloat16 or float16. Nobody waits for the device to look for NaN: a block that holds NaN or infinity has that
    for its maximum, and code 0 everywhere.

    Raises ValueError for shapes, dtypes or devices that do not fit.

    >>> codes, absmax = quantize_blockwise(torch.tensor([1.0, -4.0]), torch.linspace(-1, 1, 256))
    >>> codes.tolist(), absmax.tolist()
    ([159, 0], [4.0])
    """
    check.dtype("x", x, (torch.float32, torch.bfloat16, torch.float16))
    check_block(block)
    check_code("code", code, x)
    library = choice.library(binding.OP, x.device.type)
    if not library or x.numel() == 0:
        return reference.quantize_blockwise(x.float(), code, block, row_aligned, nonzero)
    x = x.float().contiguous()
    codes = torch.empty_like(x, dtype=torch.uint8)
    absmax = x.new_empty(absmax_shape(x, block, row_aligned))
    kernels = getattr(torch.ops, library)
    kernels.quantize_blockwise(x, code.contiguous(), codes, absmax, columns_of(x, row_aligned), block, nonzero)
    return codes, absmax
