"""Token shift: every token mixed with the one before it, in several ways at once. B batch, T time, D width, M mixes."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.rwkv_distill.elementwise import check_floats, check_parameters
from kernels_cuda.rwkv_distill.tmix_shift import binding, reference

__all__ = ["tmix_shift"]

MAX_MIXES = 8  # as in op.h


def tmix_shift(h: Tensor, prev: Tensor | None, seg: Tensor | None, mus: Tensor) -> Tensor:
    """[M, B, T, D]: h + (p - h) mus[m] for every m, where p is the token before.

    h: [B, T, D], float32, bfloat16 or float64 (always computed by the reference), like the result. mus: [M, D] with M from 1 to 8, in the
    dtype of h or float32. prev: [B, D] like h, the token before the first of each row (None: zero). seg: int64 or int32 [B, T], the
    segment of each token, below 0 for padding. The token before is the last one that is no padding; it is zero where that one is
    of another segment. Padding gives 0, has gradients 0 and may hold anything. h, prev and mus are differentiable.

    Raises ValueError for shapes, dtypes or devices that do not fit.

    >>> tmix_shift(torch.tensor([[[1.0], [3.0]]]), None, None, torch.tensor([[0.0], [0.5]])).flatten(1).tolist()
    [[1.0, 3.0], [0.5, 2.0]]
    """
    check.shapes(h=(h, "BTD"), prev=(prev, "BD"), seg=(seg, "BT"), mus=(mus, "MD"))
    check_floats(h=h, prev=prev)
    check_parameters(h, mus=mus)
    check.dtype("seg", seg, (torch.int64, torch.int32))
    check.same("device", h=h, seg=seg)
    if not 1 <= mus.shape[0] <= MAX_MIXES:
        check.fail("mus", f"shape {tuple(mus.shape)}", "has too many or no mixes", f"pass 1 to {MAX_MIXES}")
    if h.dtype == torch.float64 or not choice.library(binding.OP, h.device.type):
        return reference.tmix_shift(h, prev, seg, mus)
    source = successor = None
    if seg is not None:
        source = reference.sources(seg)
        source, successor = source.int(), reference.successors(source).int()
    out: Tensor = binding.forward(h, prev, source, successor, mus.float())
    return out
