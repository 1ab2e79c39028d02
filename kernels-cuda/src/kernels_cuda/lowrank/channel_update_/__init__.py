"""A weight's update by its gradient, every channel at a scale of its own and the whole limited in its growth."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.lowrank.channel_update_ import binding, reference
from kernels_cuda.lowrank.channel_update_.reference import limit

__all__ = ["channel_update_", "limit"]

_TYPES = (torch.float32, torch.bfloat16)


def channel_update_(
    W: Tensor,
    G: Tensor,
    sigma: Tensor,
    axis: int,
    prev_norm: Tensor | None,
    gamma: float,
    alpha: float,
    decay: float = 1.0,
    seed: int = -1,
    offset: int = 0,
    *,
    P: Tensor | None = None,
    N: Tensor | None = None,
) -> None:
    """W <- decay W - alpha (limited(U) + back(N)), with U = G whose rows (axis 0) or columns (axis 1) are multiplied by sigma.

    The limit: if q = prev_norm is above 0 and |U| > gamma q, U is multiplied by gamma q / |U|; then prev_norm <- the norm that is left.
    Nothing waits for a GPU. Without prev_norm there is no limit. With P and N, back(N) = N^T P for axis 0 and P^T N for axis 1 is
    added in the same pass (Fira: what of the update lies in the basis).

    W: [m, n], float32 or bfloat16, changed in place; a bfloat16 W is rounded as by `lowrank_update_`: to nearest, or at random with a
    seed of 0 or more. G: [m, n], float32 or bfloat16. sigma: float32, [m] or [n] by axis, or [1] for all. prev_norm: float32, a single
    number, changed in place; 0 where there is none yet. P: [r, n] (axis 0) or [r, m], N: [r, m] (axis 0) or [r, n], float32 or
    bfloat16; their product is one of bfloat16 numbers if P is and W or N is.

    Memory beyond the arguments: m numbers for the norm and a factor for every channel; with P and N some rows of back(N); a copy of
    whatever has gaps.

    Raises ValueError for shapes, dtypes, devices or settings that do not fit.

    >>> W, q = torch.ones(2, 2), torch.tensor(5.0)
    >>> channel_update_(W, torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([2.0, 4.0]), 0, q, 1.0, 0.1)
    >>> W, q
    (tensor([[0.7000, 1.0000],
            [1.0000, 0.6000]]), tensor(5.))
    """
    if axis not in (0, 1):
        check.fail("axis", axis, "is not known", "use 0 for rows or 1 for columns")
    check.shapes(W=(W, "mn"), G=(G, "mn"))
    check.shapes(W=(W, "mn"), P=(P, "rn" if axis == 0 else "rm"), N=(N, "rm" if axis == 0 else "rn"))
    for name, tensor in (("W", W), ("G", G), ("P", P), ("N", N)):
        check.dtype(name, tensor, _TYPES)
    for name, tensor in (("sigma", sigma), ("prev_norm", prev_norm)):
        check.dtype(name, tensor, (torch.float32,))
    if sigma.shape not in ((1,), (W.shape[axis],)):
        check.fail(
            "sigma", f"shape {tuple(sigma.shape)}", f"does not fit {tuple(W.shape)} along axis {axis}", "pass a number for each, or 1"
        )
    if prev_norm is not None and prev_norm.dim() != 0:
        check.fail("prev_norm", f"shape {tuple(prev_norm.shape)}", "is no single number", "pass torch.zeros(())")
    if (P is None) != (N is None):
        check.fail("P" if P is None else "N", None, "is missing", "give both P and N, or neither")
    check.same("device", W=W, G=G, sigma=sigma, prev_norm=prev_norm, P=P, N=N)
    if not gamma > 0:
        check.fail("gamma", gamma, "is not above 0", "use for example 1.01")
    if offset < 0:
        check.fail("offset", offset, "is negative", "use for example the number of the step")
    library = choice.library(binding.OP, W.device.type)
    if not library or W.numel() == 0:
        reference.channel_update_(W, G, sigma, axis, prev_norm, gamma, alpha, decay, seed, offset, P=P, N=N)
        return
    gradient, factor, weight = G.contiguous(), sigma.contiguous(), W.contiguous()
    if prev_norm is not None:
        sums = torch.empty(len(W), device=W.device)
        getattr(torch.ops, library).channel_squares_(gradient, factor, axis, sums)
        factor = factor * reference.limit(sums.sum().sqrt(), prev_norm, gamma)
    factors = None
    if P is not None and N is not None:
        P, N = (one if 1 in one.stride() else one.contiguous() for one in (P, N))
        factors = (N.t(), P) if axis == 0 else (P.t(), N)
    halves = P is not None and N is not None and P.dtype == torch.bfloat16 and torch.bfloat16 in (W.dtype, N.dtype)
    binding.update(library, weight, factors, gradient, factor, axis, alpha, decay, seed, offset, halves)
    if weight is not W:
        W.copy_(weight)
