"""Two attentions of the same queries over different keys, joined into the one over all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.beacon.segment_merge import binding, reference
from kernels_cuda.beacon.tables import DTYPES

__all__ = ["segment_merge"]


def segment_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """exp(lse_a - lse) out_a + exp(lse_b - lse) out_b, and lse = log(exp(lse_a) + exp(lse_b)): [..., d], [...].

    out_a, out_b: [..., d], outputs of two softmaxes; float32, bfloat16, float64, or float16 (always computed by the reference). lse_a, lse_b:
    [...], the logarithms of their sums, float32 (float64 for float64), -inf where a part saw nothing. Where neither did: zeros and -inf.
    Arithmetic is float32 (float64) with one rounding; all four are differentiable.

    Raises ValueError for shapes, dtypes or devices that do not fit.

    >>> one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> out, lse = segment_merge(one, torch.tensor([3.0]).log(), other, torch.zeros(1))
    >>> [round(x, 3) for x in [*out[0].tolist(), *lse.exp().tolist()]]
    [0.75, 0.25, 4.0]
    """
    check.dtype("out_a", out_a, DTYPES)
    if out_a.dim() == 0:
        check.fail("out_a", "a number", "has no heads", "give [..., d]")
    for name, x, shape in (("out_b", out_b, out_a.shape), ("lse_a", lse_a, out_a.shape[:-1]), ("lse_b", lse_b, out_a.shape[:-1])):
        if x.shape != shape:
            check.fail(name, f"shape {tuple(x.shape)}", f"does not fit out_a, {tuple(out_a.shape)}", f"give {tuple(shape)}")
    check.same("dtype", out_a=out_a, out_b=out_b)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check.dtype(name, lse, (torch.promote_types(out_a.dtype, torch.float32),))
    check.same("device", out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    if out_a.dtype == torch.float16 or not choice.library(binding.OP, out_a.device.type):
        return reference.segment_merge(out_a, lse_a, out_b, lse_b)
    flat = [x.reshape(lse_a.numel(), *x.shape[lse_a.dim() :]).contiguous() for x in (out_a, lse_a, out_b, lse_b)]
    out, lse = binding.forward(*flat)
    return out.view(out_a.shape), lse.view(lse_a.shape)
