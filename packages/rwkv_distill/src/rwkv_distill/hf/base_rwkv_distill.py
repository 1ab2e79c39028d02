"""What the time mixers of both generations share: projections like the teacher's, the recurrence over rows or packed sequences.

B batch, T time, D hidden size, A query heads x head width of the teacher, H heads of N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .configuration_rwkv_distill import RwkvDistillConfig

# (last input B x D, state B x H x N x N): all that a layer remembers of the past
LayerState = tuple[Tensor, Tensor]


class TimeMixer(nn.Module):
    """Receptance, key, value and output, with what the teacher does to its queries and keys; and the norm of each head's output."""

    def __init__(self, config: RwkvDistillConfig, layer_index: int) -> None:
        super().__init__()
        student: dict[str, Any] = config.student
        hidden, self.head_width = config.hidden_size, config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.size = int(student["head_size"])
        self.heads = width // self.size
        self.layer_index = layer_index
        self.repeat = config.num_attention_heads // config.num_key_value_heads if student["kv_heads"] == "grouped" else 1
        self.rope, self.token_shift = student["rope"], student["token_shift"]
        self.scale = self.size**-0.5 if student["wkv_scale"] and not student["group_norm"] else 1.0
        bias = student["qkv_bias"]
        self.receptance = nn.Linear(hidden, width, bias=bias)
        self.key = nn.Linear(hidden, width // self.repeat, bias=bias)
        self.value = nn.Linear(hidden, width // self.repeat, bias=bias)
        self.output = nn.Linear(width, hidden, bias=student["output_bias"])
        self.r_norm = nn.RMSNorm(self.head_width, eps=config.teacher["rms_norm_eps"]) if student["qk_norm"] else None
        self.k_norm = nn.RMSNorm(self.head_width, eps=config.teacher["rms_norm_eps"]) if student["qk_norm"] else None
        self.ln_x = nn.GroupNorm(self.heads, width, eps=self.size * 1e-5) if student["group_norm"] else None

    def project(
        self, h_r: Tensor, h_k: Tensor, h_v: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Receptance, key and value, B x T x A: normalised, rotated and repeated like the teacher's queries, keys and values."""
        r, k, v = (layer(x).unflatten(-1, (-1, self.head_width)) for layer, x in
                   ((self.receptance, h_r), (self.key, h_k), (self.value, h_v)))  # fmt: skip
        if self.r_norm is not None and self.k_norm is not None:
            r, k = self.r_norm(r).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope:
            if position_embeddings is None:
                raise ValueError("position_embeddings: this student rotates receptance and key; pass cosine and sine")
            r, k = rotate(r, *position_embeddings), rotate(k, *position_embeddings)
        if self.repeat > 1:
            k, v = k.repeat_interleave(self.repeat, 2), v.repeat_interleave(self.repeat, 2)
        return r.flatten(2), k.flatten(2), v.flatten(2)

    def split(self, value: Tensor) -> Tensor:
        """B x T x A by heads."""
        return value.view(*value.shape[:-1], self.heads, self.size)


def recur(
    operator: Callable[..., Any], step: Callable[..., Tensor], inputs: list[Tensor], constants: list[Tensor],
    state: Tensor | None, mask: Tensor | None, starts: Tensor | None, return_state: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Outputs (B x T x H x N) of a recurrence and the state behind them. `starts` (B x T) is given for packed rows alone."""
    batch, time = inputs[0].shape[:2]
    if inputs[0].is_meta:
        return torch.stack(inputs).sum(0), state
    found: tuple[Tensor, Tensor | None]
    if starts is not None:
        # one long row, in which every row and every segment is a sequence
        edges = F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=batch * time).int()
        flat = [value.reshape(1, batch * time, *value.shape[2:]) for value in inputs]
        y, _ = operator(*flat, *constants, mask=None if mask is None else mask.reshape(1, -1), cu_seqlens=edges)
        return y.view_as(inputs[0]), None
    if time == 1 and state is not None and mask is None and not torch.is_grad_enabled():
        return step(*(value[:, 0] for value in inputs), *constants, state)[:, None], state
    found = operator(*inputs, *constants, initial_state=state, mask=mask, output_final_state=return_state)
    return found


def sequence_starts(mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
    """Where (B x T, bool) a token has no predecessor: the first token of a row or segment, and every token behind padding.

    None stands for the first token of each row alone.
    """
    given = segment_ids if segment_ids is not None else mask
    if given is None:
        return None
    starts = torch.zeros_like(given, dtype=torch.bool)
    starts[:, 0] = True
    if segment_ids is not None:
        starts[:, 1:] |= segment_ids[:, 1:] != segment_ids[:, :-1]
    if mask is not None:
        starts[:, 1:] |= mask[:, :-1] == 0
    return starts


def segments(mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
    """The sequence of every token (B x T), -1 for padding; None where every row is one whole sequence."""
    if segment_ids is None:
        return None if mask is None else mask.long() - 1
    return segment_ids if mask is None else segment_ids.masked_fill(mask == 0, -1)


def previous(h: Tensor, starts: Tensor | None, first: Tensor | None) -> Tensor:
    """The input before each token (B x T x D); at the start of a sequence `first` (B x D), or zero."""
    past = torch.zeros_like(h[:, :1]) if first is None else first[:, None].to(h.dtype)
    shifted = torch.cat([past, h[:, :-1]], 1)
    return shifted if starts is None else torch.where(starts[:, :, None], past, shifted)


def last(h: Tensor, mask: Tensor | None, before: Tensor | None) -> Tensor:
    """The last real input of each row (B x D); that of `before`, or zero, where a row has none."""
    if mask is None:
        return h[:, -1]
    real = mask.bool()
    index = (real * torch.arange(h.shape[1], device=h.device)).argmax(1)
    found = h[torch.arange(len(h), device=h.device), index]
    return torch.where(real.any(1, keepdim=True), found, torch.zeros_like(found) if before is None else before.to(h.dtype))


def rotate(x_BThn: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of heads in the layout of the teachers (first half, second half)."""
    left, right = x_BThn.chunk(2, -1)
    turned = torch.cat([-right, left], -1)
    return x_BThn * cos[:, :, None].to(x_BThn.dtype) + turned * sin[:, :, None].to(x_BThn.dtype)
