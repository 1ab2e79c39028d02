"""Checks that the ops on rotated keys share."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check

# float16 is always computed by the references
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tables(k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Cosines and sines of half a head, in float32 or wider."""
    for name, table in (("cos", cos), ("sin", sin)):
        check.dtype(name, table, (torch.promote_types(k.dtype, torch.float32),))
    if k.shape[3] != 2 * cos.shape[1]:
        check.fail("cos", f"shape {tuple(cos.shape)}", f"does not hold {k.shape[3]} / 2 angles", "give half the head size")


def check_dense(**tensors: Tensor) -> None:
    """Numbers of a head lie side by side, in memory that an op writes into."""
    for name, x in tensors.items():
        if x.stride(-1) != 1:
            check.fail(name, f"strides {x.stride()}", "spread the numbers of a head", "give a tensor whose last stride is 1")


def looked_at(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device."""
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()
