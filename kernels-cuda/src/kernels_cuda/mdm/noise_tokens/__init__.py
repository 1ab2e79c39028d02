"""Tokens masked at random, by draws that depend on nothing but their address."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.mdm.noise_tokens import binding, reference

__all__ = ["masked_tokens", "noise_tokens"]


def noise_tokens(
    ids: Tensor, p: Tensor, key: int, stream: int, slot: Tensor, mask_id: int, eligible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ids` (B x S, int64) with `mask_id` where a token is masked, and where that is (B x S, bool); see `masked_tokens`.

    >>> ids, p, slot = torch.arange(4)[None], torch.tensor([0.5]), torch.tensor([7])
    >>> noise_tokens(ids, p, key=0, stream=0, slot=slot, mask_id=9)[0].tolist()
    [[0, 9, 2, 9]]
    """
    check.dtype("ids", ids, (torch.int64,))
    check.shapes(ids=(ids, "BS"), p=(p, "B"))
    masked = masked_tokens(p, key, stream, slot, ids.shape[1], eligible)
    return torch.where(masked, mask_id, ids), masked


def masked_tokens(p: Tensor, key: int, stream: int, slot: Tensor, size: int, eligible: Tensor | None = None) -> Tensor:
    """Which of `size` tokens are masked in each of B sequences (B x S, bool): eligible ones, each with the chance p of its sequence.

    Token s of a sequence is masked if u < p, where u = (x >> 8) / 2^24 and x is lane s mod 4 of Philox4x32-10 with the halves of
    `key` (a signed 64-bit number, low first) as its key and (slot low, slot high, s >> 2, stream) as its counter. The bits are the
    same on every device, whatever else is in the batch.

    p: B chances (float32); slot: B addresses (int64), the numbers of samples, say; eligible: B x S (bool), default all tokens.
    Nobody waits for a GPU to look at chances there; on a CPU they are checked.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for chances outside 0 to 1.
    """
    check.dtype("p", p, (torch.float32, torch.float64))
    check.dtype("slot", slot, (torch.int64,))
    check.dtype("eligible", eligible, (torch.bool,))
    check.shapes(p=(p, "B"), slot=(slot, "B"), eligible=(eligible, "BS"))
    check.same("device", p=p, slot=slot, eligible=eligible)
    if size < 0 or (eligible is not None and eligible.shape[1] != size):
        check.fail("size", size, "is not the number of tokens", "give that of a sequence")
    if p.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(((p >= 0) & (p <= 1)).all()):
        check.fail("p", p[~((p >= 0) & (p <= 1))][0].item(), "is no chance", "use numbers from 0 to 1")
    library = choice.library(binding.OP, p.device.type)
    if not library or size == 0 or len(p) == 0:
        return reference.masked_tokens(p, key, stream, slot, size, eligible)
    masked = torch.empty(len(p), size, dtype=torch.bool, device=p.device)
    kernels = getattr(torch.ops, library)
    kernels.mask_tokens(p.float().contiguous(), slot.contiguous(), None if eligible is None else eligible.contiguous(), masked, key, stream)
    return masked
