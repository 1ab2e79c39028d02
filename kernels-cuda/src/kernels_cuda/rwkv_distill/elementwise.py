"""What the element-wise stages around a recurrence share."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check


def check_floats(**tensors: Tensor | None) -> None:
    """One dtype that kernels have, or float64; one device."""
    for name, tensor in tensors.items():
        check.dtype(name, tensor, (torch.float32, torch.bfloat16, torch.float64))
    check.same("dtype", **tensors)
    check.same("device", **tensors)


def check_parameters(like: Tensor, **tensors: Tensor | None) -> None:
    """Parameters may stay in float32 beside bfloat16 activations."""
    for name, tensor in tensors.items():
        check.dtype(name, tensor, tuple({torch.promote_types(like.dtype, torch.float32), like.dtype}))
        if tensor is not None and tensor.device != like.device:
            check.same("device", inputs=like, **{name: tensor})
