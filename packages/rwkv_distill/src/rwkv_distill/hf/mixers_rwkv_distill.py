"""RWKV-7 time mixing in the place of a Transformer's attention (Peng et al. 2025, arXiv:2503.14456).

B batch, T time, D hidden size, A query heads x head width of the teacher, H heads of N, K key/value width. Parameters have the names of
the `time_mixer` tensors of ARWKV checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .configuration_rwkv_distill import RwkvDistillConfig

try:
    from kernels_cuda.rwkv_distill import wkv7, wkv7_step
except ImportError:
    from .recurrence_rwkv_distill import wkv7, wkv7_step

# (last input B x D, state B x H x N x N): all that a layer remembers of the past
LayerState = tuple[Tensor, Tensor]


class Rwkv7Mixer(nn.Module):
    """Attention replaced by a recurrence whose state has a fixed size. Which parts exist is said by `config.student`.

    New parameters are zeros or PyTorch's default; `rwkv_distill.init` gives them their values.
    """

    def __init__(self, config: RwkvDistillConfig, layer_index: int) -> None:
        super().__init__()
        student: dict[str, Any] = config.student
        hidden, self.head_width = config.hidden_size, config.head_dim
        width = config.num_attention_heads * config.head_dim
        self.size = int(student["head_size"])
        self.heads = width // self.size
        self.layer_index = layer_index
        # value of this layer is what later layers mix into their own
        self.defines_v_first = layer_index == min(student["layers"])
        self.repeat = config.num_attention_heads // config.num_key_value_heads if student["kv_heads"] == "grouped" else 1
        self.gate, self.rope = student["gate"], student["rope"]
        self.token_shift, self.bonus = student["token_shift"], student["bonus"]
        self.value_residual = student["value_residual"] and not self.defines_v_first
        self.scale = self.size**-0.5 if student["wkv_scale"] and not student["group_norm"] else 1.0
        ranks, bias = student["ranks"], student["qkv_bias"]

        def vector(size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(1, 1, size))

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(rows, columns))

        if self.token_shift:
            self.x_r, self.x_w, self.x_k, self.x_v, self.x_a = (vector(hidden) for _ in range(5))
            if self.gate != "none":
                self.x_g = vector(hidden)
        self.w0, self.w1, self.w2 = vector(width), matrix(hidden, ranks["decay"]), matrix(ranks["decay"], width)
        self.a0, self.a1, self.a2 = vector(width), matrix(hidden, ranks["iclr"]), matrix(ranks["iclr"], width)
        if self.value_residual:
            self.v0, self.v1, self.v2 = vector(width), matrix(hidden, ranks["value"]), matrix(ranks["value"], width)
        if self.gate != "none":
            self.g1, self.g2 = matrix(hidden, ranks["gate"]), matrix(ranks["gate"], width)
        self.k_k, self.k_a = vector(width), vector(width)
        if self.bonus:
            self.r_k = matrix(self.heads, self.size)
        self.receptance = nn.Linear(hidden, width, bias=bias)
        self.key = nn.Linear(hidden, width // self.repeat, bias=bias)
        self.value = nn.Linear(hidden, width // self.repeat, bias=bias)
        self.output = nn.Linear(width, hidden, bias=student["output_bias"])
        self.r_norm = nn.RMSNorm(self.head_width, eps=config.teacher["rms_norm_eps"]) if student["qk_norm"] else None
        self.k_norm = nn.RMSNorm(self.head_width, eps=config.teacher["rms_norm_eps"]) if student["qk_norm"] else None
        self.ln_x = nn.GroupNorm(self.heads, width, eps=self.size * 1e-5) if student["group_norm"] else None

    def forward(
        self,
        h: Tensor,
        v_first: Tensor | None = None,
        state: LayerState | None = None,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        return_state: bool = True,
    ) -> tuple[Tensor, Tensor | None, LayerState | None]:
        """Output (B x T x D), the value of the defining layer (B x T x A), and the state after the last token.

        h: normalised inputs, B x T x D. v_first: the second result of the defining layer. mask (B x T, 1 = real) keeps padding out of
        everything. segment_ids (B x T) separate packed sequences, which start without a past; there is no state then.
        position_embeddings: cosine and sine (B or 1 x T x head width), where the student rotates. With gradients off, a single token
        with a state advances that state in place.
        """
        if segment_ids is not None and state is not None:
            raise ValueError("state: packed sequences start without a past; leave out segment_ids or state")
        batch, time, _ = h.shape
        starts = sequence_starts(mask, segment_ids)
        if self.token_shift:
            before = previous(h, starts, None if state is None else state[0])
            inputs = {name: h + (before - h) * getattr(self, f"x_{name}").to(h.dtype) for name in "rwkvag" if hasattr(self, f"x_{name}")}
        else:
            inputs = dict.fromkeys("rwkvag", h)
        r, k, v = self._project(inputs["r"], inputs["k"], inputs["v"], position_embeddings)
        decay = self.w0 + torch.tanh(inputs["w"] @ self.w1) @ self.w2
        rate = torch.sigmoid(self.a0 + (inputs["a"] @ self.a1) @ self.a2)
        if self.value_residual:
            if v_first is None:
                raise ValueError(f"v_first: layer {self.layer_index} needs the value of the first RWKV layer; run that one before it")
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (inputs["v"] @ self.v1) @ self.v2)
        elif self.defines_v_first:
            v_first = v

        def split(value: Tensor) -> Tensor:
            return value.view(batch, time, self.heads, self.size)

        r_BTHN, v_BTHN, rate_BTHN = split(r), split(v), split(rate)
        removal_BTHN = F.normalize(split(k * self.k_k), dim=-1, eps=1e-12)
        k_BTHN = split(k * (1 + (rate - 1) * self.k_a))
        y_BTHN, memory = self._recur(
            # one dtype, as the operator asks; the state stays float32
            [value.to(r.dtype) for value in (r_BTHN, split(decay), k_BTHN, v_BTHN, -removal_BTHN, removal_BTHN * rate_BTHN)],
            None if state is None else state[1], mask, starts if segment_ids is not None else None, return_state,
        )  # fmt: skip
        y = y_BTHN.reshape(batch, time, -1)
        y = y * self.scale if self.ln_x is None else self.ln_x(y.flatten(0, 1)).view_as(y)
        if self.bonus:
            y = y + ((r_BTHN * k_BTHN * self.r_k).sum(-1, keepdim=True) * v_BTHN).flatten(2)
        if self.gate == "sigmoid":
            y = y * (torch.sigmoid(inputs["g"] @ self.g1) @ self.g2)
        elif self.gate == "residual":
            y = y * (1 + torch.sigmoid(inputs["g"] @ self.g1) @ self.g2)
        out = self.output(y.to(h.dtype))
        after = None if memory is None else (last(h, mask, None if state is None else state[0]), memory)
        return out, v_first, after

    def _project(
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

    def _recur(
        self, inputs: list[Tensor], state: Tensor | None, mask: Tensor | None, starts: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs (B x T x H x N) and the state behind them."""
        batch, time = inputs[0].shape[:2]
        if inputs[0].is_meta:
            return inputs[0] + sum(inputs[1:]), state
        if starts is not None:
            # one long row, in which every row and every segment is a sequence
            edges = F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=batch * time).int()
            flat = [value.reshape(1, batch * time, *value.shape[2:]) for value in inputs]
            y, _ = wkv7(*flat, mask=None if mask is None else mask.reshape(1, -1), cu_seqlens=edges)
            return y.view_as(inputs[0]), None
        if time == 1 and state is not None and mask is None and not torch.is_grad_enabled():
            r, w, k, v, a, b = (value[:, 0] for value in inputs)
            return wkv7_step(r, w, k, v, a, b, state)[:, None], state
        return wkv7(*inputs, initial_state=state, mask=mask, output_final_state=return_state)


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
