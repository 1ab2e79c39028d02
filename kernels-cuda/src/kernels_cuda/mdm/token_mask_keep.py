"""Token masking: which keys a query keeps, in plain integer operations, so that the same code fills a tensor and is traced into a fused kernel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels_cuda import check
from kernels_cuda.mdm.noise_tokens.reference import philox, unit

# first word of a sample beyond those of its pairs
_WHOLE = 2**31
# places q S + k of pairs take four to a word, and stay below that
LONGEST = 65536


def token_mask_keep(
    key: int | Tensor,
    stream: int,
    slot: Tensor,
    q_idx: Tensor,
    k_idx: Tensor,
    seq_len: int,
    ratio: float,
    eps: float,
    mode: Literal["attention", "column"],
) -> Tensor:
    """Whether query `q_idx` sees key `k_idx` (bool): itself, and earlier ones that are not hidden.

    attention: a query is selected with probability `ratio`, and then hides each earlier key with probability p = eps + (1 - eps) u of
    its own; column: a selected key is hidden from every query but its own.

    slot (addresses of samples), q_idx and k_idx are int64 or int32 and broadcast; a compiled attention gives one number of each. The
    pair (q, k) draws element q seq_len + k of its sample; lanes 0 and 1 of word 2^31 + i hold the selection and u of row (column) i.

    Raises ValueError for an unknown mode and for more than 65536 tokens.

    >>> place = torch.arange(3)
    >>> token_mask_keep(0, 0, torch.tensor(5), place[:, None], place, 3, ratio=1.0, eps=0.5, mode="column").int().tolist()
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    check.one_of("mode", mode, ("attention", "column"))
    if not 0 < seq_len <= LONGEST:
        check.fail("seq_len", seq_len, "is no number of tokens", f"use 1 to {LONGEST}")
    slot, q_idx, k_idx = slot.long(), q_idx.long(), k_idx.long()
    selected, chance, *_ = philox(slot, _WHOLE + (q_idx if mode == "attention" else k_idx), stream, key)
    hidden = unit(selected) < ratio
    if mode == "attention":
        place = q_idx * seq_len + k_idx
        first, second, third, fourth = philox(slot, place >> 2, stream, key)
        lane = place & 3
        pair = torch.where(lane < 2, torch.where(lane == 0, first, second), torch.where(lane == 2, third, fourth))
        hidden = hidden & (unit(pair) < eps + (1 - eps) * unit(chance))
    return ((k_idx < q_idx) & ~hidden) | (k_idx == q_idx)
