"""The definition of the op, in plain PyTorch, differentiable by autograd. B batch, T time, D width, M mixes."""

from __future__ import annotations

import torch
from torch import Tensor

FROM_PREV, FROM_NOTHING, PADDING = -1, -2, -3


def sources(seg: Tensor) -> Tensor:
    """[B, T]: the place of the token before, which is the last one that is no padding if it is of the same segment, else one of the
    numbers above."""
    real_BT = seg >= 0
    place_BT = torch.arange(seg.shape[1], device=seg.device).expand(seg.shape)
    last_BT = torch.where(real_BT, place_BT, -1).cummax(dim=1).values
    before_BT = torch.cat([torch.full_like(last_BT[:, :1], -1), last_BT[:, :-1]], dim=1)
    same_BT = seg.gather(1, before_BT.clamp_min(0)) == seg
    source_BT = torch.where(before_BT < 0, FROM_PREV, torch.where(same_BT, before_BT, FROM_NOTHING))
    return torch.where(real_BT, source_BT, PADDING)


def successors(source_BT: Tensor) -> Tensor:
    """[B, T]: the token whose source a token is, or -1."""
    batch, time = source_BT.shape
    place_BT = torch.arange(time, device=source_BT.device).expand(source_BT.shape)
    # whoever has no source writes beyond the end
    found_BT = torch.full((batch, time + 1), -1, device=source_BT.device, dtype=place_BT.dtype)
    return found_BT.scatter(1, torch.where(source_BT >= 0, source_BT, time), place_BT)[:, :-1]


def tmix_shift(h: Tensor, prev: Tensor | None, seg: Tensor | None, mus: Tensor) -> Tensor:
    """See the public function of the same name; arithmetic is float32 or wider."""
    wide = torch.promote_types(h.dtype, torch.float32)
    batch, time, width = h.shape
    if seg is None:
        seg = torch.zeros(batch, time, dtype=torch.int64, device=h.device)
    source_BT = sources(seg)
    padding_BT1 = (source_BT == PADDING)[:, :, None]
    own_BTD = h.to(wide).masked_fill(padding_BT1, 0)
    first_B1D = h.new_zeros(batch, 1, width, dtype=wide) if prev is None else prev.to(wide)[:, None]
    # places of the table: prev, nothing, then the tokens
    table = torch.cat([first_B1D, torch.zeros_like(first_B1D), own_BTD], dim=1)
    index_BT = torch.where(source_BT >= 0, source_BT + 2, torch.where(source_BT == FROM_PREV, 0, 1))
    before_BTD = table.gather(1, index_BT[:, :, None].expand(-1, -1, width)).masked_fill(padding_BT1, 0)
    return (own_BTD + (before_BTD - own_BTD) * mus.to(wide)[:, None, None]).to(h.dtype)
