"""Numbers of 4 bits as floats again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.lowrank.pack_int4.reference import GROUP
from kernels_cuda.lowrank.unpack_int4 import binding, reference

__all__ = ["unpack_int4"]


def check_packed(codes: Tensor, scale: Tensor, zero: Tensor, size: int) -> None:
    """These are what `pack_int4` gives for `size` numbers."""
    groups = (size + GROUP - 1) // GROUP
    for name, part, dtype, length in (
        ("codes", codes, torch.uint8, (size + 1) // 2),
        ("scale", scale, torch.float16, groups),
        ("zero", zero, torch.float16, groups),
    ):
        check.dtype(name, part, (dtype,))
        if part.shape != (length,):
            check.fail(name, f"shape {tuple(part.shape)}", f"does not hold {size} numbers", f"pass {(length,)}")
    check.same("device", codes=codes, scale=scale, zero=zero)


def unpack_int4(codes: Tensor, scale: Tensor, zero: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that `pack_int4` coded: code times step plus offset, of the given shape, in float32 or rounded to bfloat16.

    codes: uint8, half as many as there are numbers; scale and zero: float16, one for each 256 numbers.

    Raises ValueError for shapes, dtypes or devices that do not fit.

    >>> half = dict(dtype=torch.float16)
    >>> unpack_int4(torch.tensor([0x21, 0x03], dtype=torch.uint8), torch.tensor([0.5], **half), torch.tensor([1.0], **half), (3,))
    tensor([1.5000, 2.0000, 2.5000])
    """
    check_packed(codes, scale, zero, math.prod(shape))
    if dtype not in (torch.float32, torch.bfloat16):
        check.fail("dtype", dtype, "is not supported", "use torch.float32 or torch.bfloat16")
    library = choice.library(binding.OP, codes.device.type)
    if not library or len(codes) == 0:
        return reference.unpack_int4(codes, scale, zero, shape, dtype)
    out = torch.empty(tuple(shape), dtype=dtype, device=codes.device)
    getattr(torch.ops, library).unpack_int4(codes.contiguous(), scale.contiguous(), zero.contiguous(), out)
    return out
