"""A weight's update from a low-rank space, without a matrix of the weight's size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.lowrank.lowrank_update_ import binding, reference

__all__ = ["lowrank_update_"]


def lowrank_update_(
    W: Tensor,
    P: Tensor,
    N: Tensor,
    side: Literal["left", "right"],
    alpha: float,
    decay: float = 1.0,
    seed: int = -1,
    offset: int = 0,
) -> None:
    """W <- decay W - alpha back(N), with back(N) = P^T N for side "left" and N^T P for side "right".

    W: [m, n], float32 or bfloat16, changed in place. P: [r, m] (left) or [r, n] (right), and N: [r, n] or [r, m], each float32 or
    bfloat16. The product is one of bfloat16 numbers if P is and W or N is, else of float32 ones; what follows is float32. A bfloat16
    W is rounded to nearest, or, with a seed of 0 or more, to one of its neighbours at random, the nearer the likelier: an update
    below half a step is then not lost but rare. Element e = row n + column draws 16 bits, half e % 2 (0 the lower) of word
    e // 2 % 512 that weights.h mixes from Philox4x32-10 with the key `seed` and the counter (offset, e // 1024, stream 13): the same on every
    device, for any number of threads. (They need the same products, whose last bits differ between libraries.)

    Memory beyond the arguments: some rows of back(N) after a product of bfloat16 numbers or for a bfloat16 W, none otherwise; a copy
    of N and P where they have another type than the product.

    Raises ValueError for shapes, dtypes, devices or settings that do not fit.

    >>> W = torch.ones(2, 3)
    >>> lowrank_update_(W, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0, 3.0]]), "left", 0.5)
    >>> W.tolist()
    [[0.5, 0.0, -0.5], [1.0, 1.0, 1.0]]
    """
    check.one_of("side", side, ("left", "right"))
    of_P, of_N = ("rm", "rn") if side == "left" else ("rn", "rm")
    check.shapes(W=(W, "mn"), P=(P, of_P), N=(N, of_N))
    check.dtype("W", W, (torch.float32, torch.bfloat16))
    check.dtype("P", P, (torch.float32, torch.bfloat16))
    check.dtype("N", N, (torch.float32, torch.bfloat16))
    check.same("device", W=W, P=P, N=N)
    if offset < 0:
        check.fail("offset", offset, "is negative", "use for example the number of the step")
    library = choice.library(binding.OP, W.device.type)
    if not library:
        reference.lowrank_update_(W, P, N, side, alpha, decay, seed, offset)
        return
    halves = P.dtype == torch.bfloat16 and torch.bfloat16 in (W.dtype, N.dtype)
    P, N = (one if 1 in one.stride() else one.contiguous() for one in (P, N))
    factors = (P.t(), N) if side == "left" else (N.t(), P)
    weight = W.contiguous()
    binding.update(library, weight, *factors, alpha, decay, seed, offset, halves)
    if weight is not W:
        W.copy_(weight)
