"""A fixed number of tokens masked at random, by draws that depend on nothing but their address."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.mdm.noise_fixed_count import binding, reference

__all__ = ["masked_count", "noise_fixed_count"]


def noise_fixed_count(
    ids: Tensor, k: Tensor, key: int, stream: int, slot: Tensor, mask_id: int, eligible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ids` (B x S, int64) with `mask_id` where a token is masked, and where that is (B x S, bool); see `masked_count`.

    >>> ids, k, slot = torch.arange(4)[None], torch.tensor([1], dtype=torch.int32), torch.tensor([7])
    >>> noise_fixed_count(ids, k, key=0, stream=0, slot=slot, mask_id=9)[1].sum().item()
    1
    """
    check.dtype("ids", ids, (torch.int64,))
    check.shapes(ids=(ids, "BS"), k=(k, "B"))
    masked = masked_count(k, key, stream, slot, ids.shape[1], eligible)
    return torch.where(masked, mask_id, ids), masked


def masked_count(k: Tensor, key: int, stream: int, slot: Tensor, size: int, eligible: Tensor | None = None) -> Tensor:
    """Which of `size` tokens are masked in each of B sequences (B x S, bool): the k eligible ones with the smallest draws.

    The draw of token s is the 32-bit word x of `masked_tokens`; of equal ones the lower place comes first. Every set of k eligible
    tokens is equally likely.

    k: B counts (int32); slot: B addresses (int64); eligible: B x S (bool), default all tokens. Nobody waits for a GPU to look at
    counts there, where one that is too large masks all that is eligible; on a CPU they are checked.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for counts below 0 or above the eligible tokens.
    """
    check.dtype("k", k, (torch.int32,))
    check.dtype("slot", slot, (torch.int64,))
    check.dtype("eligible", eligible, (torch.bool,))
    check.shapes(k=(k, "B"), slot=(slot, "B"), eligible=(eligible, "BS"))
    check.same("device", k=k, slot=slot, eligible=eligible)
    if size < 0 or (eligible is not None and eligible.shape[1] != size):
        check.fail("size", size, "is not the number of tokens", "give that of a sequence")
    if k.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (k < 0) | (k > (size if eligible is None else eligible.sum(1)))
        if bool(wrong.any()):
            check.fail("k", int(k[wrong][0]), "is no number of eligible tokens", "use 0 to as many as there are")
    library = choice.library(binding.OP, k.device.type)
    if not library or size == 0 or len(k) == 0:
        return reference.masked_count(k, key, stream, slot, size, eligible)
    masked = torch.empty(len(k), size, dtype=torch.bool, device=k.device)
    kernels = getattr(torch.ops, library)
    kernels.mask_count(k.contiguous(), slot.contiguous(), None if eligible is None else eligible.contiguous(), masked, key, stream)
    return masked
