"""Normal numbers with an address: those of a random projection are drawn anew wherever they are needed instead of being stored."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.lowrank.blocks import check_contiguous
from kernels_cuda.lowrank.gaussian_ import binding, reference

__all__ = ["gaussian_"]


def gaussian_(out: Tensor, seed: int, param: int, index: int) -> None:
    """out <- independent standard normal numbers, the same on every device for the same address.

    Words are those of Philox4x32-10 with the halves of `seed` (64 bits, low first) as key and (index, param, e // 4, stream 12) as
    counter, for element e of `out` in the order of memory. Lanes (0, 1) and (2, 3) are pairs of Box-Muller: with the upper 24 bits
    a and b of the two words, sqrt(-2 ln((a + 1) / 2^24)) times the cosine and the sine of 2 pi b / 2^24; the arithmetic is float64.

    out: float32, contiguous, of any shape. param and index: from 0 to 2^32 - 1, for example the number of a parameter and of a refresh.

    Raises ValueError for a dtype, strides or an address that do not fit.

    >>> out = torch.empty(2, 3)
    >>> gaussian_(out, seed=0, param=0, index=0)
    >>> [round(value, 4) for value in out.flatten().tolist()]
    [-1.3405, -0.068, -0.6523, 0.0149, -0.5269, -0.6223]
    """
    check.dtype("out", out, (torch.float32,))
    check_contiguous(out=out)
    for name, value in (("param", param), ("index", index)):
        if not 0 <= value < 2**32:
            check.fail(name, value, "is no number of 32 bits", "use one from 0 to 4294967295")
    # 64 bits as a schema takes them: with a sign
    key = (seed + 2**63) % 2**64 - 2**63
    library = choice.library(binding.OP, out.device.type)
    if not library:
        reference.gaussian_(out, key, param, index)
    elif out.numel() > 0:
        getattr(torch.ops, library).gaussian_(out, key, param, index)
