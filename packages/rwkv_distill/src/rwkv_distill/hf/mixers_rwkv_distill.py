"""RWKV-7 and RWKV-6 time mixing in the place of a Transformer's attention (Peng et al. 2025, arXiv:2503.14456; 2024, arXiv:2404.05892).

B batch, T time, D hidden size, A query heads x head width of the teacher, H heads of N. Parameters of RWKV-7 have the names of the
`time_mixer` tensors of ARWKV checkpoints.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base_rwkv_distill import LayerState, TimeMixer, last, previous, recur, segments, sequence_starts

if TYPE_CHECKING:
    from .configuration_rwkv_distill import RwkvDistillConfig

try:
    from kernels_cuda.rwkv_distill import tmix_out, tmix_shift, wkv6, wkv6_step, wkv7, wkv7_step
except ImportError:
    from .recurrence_rwkv_distill import tmix_out, tmix_shift, wkv6, wkv6_step, wkv7, wkv7_step

MIX_RANK = 32
FASTEST_DECAY = math.log(5.0)  # the log-decay of RWKV-6 is -exp(w), kept above -5


def vector(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, 1, size))


def matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, columns))


class Rwkv7Mixer(TimeMixer):
    """Attention replaced by a recurrence whose state has a fixed size. Which parts exist is said by `config.student`.

    New parameters are zeros or PyTorch's default; `rwkv_distill.init` gives them their values.
    """

    def __init__(self, config: RwkvDistillConfig, layer_index: int) -> None:
        super().__init__(config, layer_index)
        # may be replaced by another implementation
        self.operator = wkv7
        student: dict[str, Any] = config.student
        hidden, width, ranks = config.hidden_size, self.heads * self.size, student["ranks"]
        # value of this layer is what later layers mix into their own
        self.defines_v_first = layer_index == min(student["layers"])
        self.gate, self.bonus = student["gate"], student["bonus"]
        self.value_residual = student["value_residual"] and not self.defines_v_first
        self.inputs = "rwkvag" if self.gate != "none" else "rwkva"
        if self.token_shift:
            for name in self.inputs:
                setattr(self, f"x_{name}", vector(hidden))
        self.w0, self.w1, self.w2 = vector(width), matrix(hidden, ranks["decay"]), matrix(ranks["decay"], width)
        self.a0, self.a1, self.a2 = vector(width), matrix(hidden, ranks["iclr"]), matrix(ranks["iclr"], width)
        if self.value_residual:
            self.v0, self.v1, self.v2 = vector(width), matrix(hidden, ranks["value"]), matrix(ranks["value"], width)
        if self.gate != "none":
            self.g1, self.g2 = matrix(hidden, ranks["gate"]), matrix(ranks["gate"], width)
        self.k_k, self.k_a = vector(width), vector(width)
        if self.bonus:
            self.r_k = matrix(self.heads, self.size)

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
        inputs = dict.fromkeys(self.inputs, h)
        if self.token_shift:
            mixes = torch.cat([getattr(self, f"x_{name}")[0] for name in self.inputs])
            before = None if state is None else state[0].to(h.dtype)
            inputs = dict(zip(self.inputs, tmix_shift(h, before, segments(mask, segment_ids), mixes).unbind(0)))
        r, k, v = self.project(inputs["r"], inputs["k"], inputs["v"], position_embeddings)
        decay = self.w0 + torch.tanh(inputs["w"] @ self.w1) @ self.w2
        rate = torch.sigmoid(self.a0 + (inputs["a"] @ self.a1) @ self.a2)
        if self.value_residual:
            if v_first is None:
                raise ValueError(f"v_first: layer {self.layer_index} needs the value of the first RWKV layer; run that one before it")
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (inputs["v"] @ self.v1) @ self.v2)
        elif self.defines_v_first:
            v_first = v
        r_BTHN, v_BTHN, rate_BTHN = self.split(r), self.split(v), self.split(rate)
        removal_BTHN = F.normalize(self.split(k * self.k_k), dim=-1, eps=1e-12)
        k_BTHN = self.split(k * (1 + (rate - 1) * self.k_a))
        # one dtype, as the operator asks; the state stays float32
        operands = [x.to(r.dtype) for x in (r_BTHN, self.split(decay), k_BTHN, v_BTHN, -removal_BTHN, removal_BTHN * rate_BTHN)]
        starts = None if segment_ids is None else sequence_starts(mask, segment_ids)
        y_BTHN, memory = recur(self.operator, wkv7_step, operands, [], None if state is None else state[1], mask, starts, return_state)
        gate = None if self.gate == "none" else torch.sigmoid(inputs["g"] @ self.g1) @ self.g2 + (self.gate == "residual")
        bonus = (operands[0], operands[2], operands[3], self.r_k) if self.bonus else (None, None, None, None)
        out = self.output(self._finish(y_BTHN, gate, bonus).to(h.dtype))
        after = None if memory is None else (last(h, mask, None if state is None else state[0]), memory)
        return out, v_first, after

    def _finish(self, y_BTHN: Tensor, gate: Tensor | None, bonus: tuple[Any, Any, Any, Any]) -> Tensor:
        """Outputs of the recurrence, normalised or scaled, with bonus and gate: B x T x A."""
        if self.ln_x is not None:
            gate = None if gate is None else gate.to(y_BTHN.dtype)
            return tmix_out(y_BTHN, *bonus, self.ln_x.weight, self.ln_x.bias, gate, self.ln_x.eps).flatten(2)
        y = y_BTHN.flatten(2) * self.scale
        r, k, v, r_k = bonus
        if r_k is not None:
            y = y + ((r * k * r_k).sum(-1, keepdim=True) * v).flatten(2)
        return y if gate is None else y * gate


class Rwkv6Mixer(TimeMixer):
    """The generation before: how much of the past token an input takes depends on the token, and the state only decays and learns."""

    defines_v_first = False

    def __init__(self, config: RwkvDistillConfig, layer_index: int) -> None:
        super().__init__(config, layer_index)
        self.operator = wkv6
        student: dict[str, Any] = config.student
        hidden, width, rank = config.hidden_size, self.heads * self.size, student["ranks"]["decay"]
        self.gating = student["gate"]
        self.inputs = "wkvrg" if self.gating != "none" else "wkvr"
        if self.token_shift:
            for name in ("x", *self.inputs):
                setattr(self, f"x_{name}", vector(hidden))
            self.m1 = matrix(hidden, len(self.inputs) * MIX_RANK)
            self.m2 = nn.Parameter(torch.zeros(len(self.inputs), MIX_RANK, hidden))
        self.w0, self.w1, self.w2 = vector(width), matrix(hidden, rank), matrix(rank, width)
        self.u = matrix(self.heads, self.size)
        self.gate = None if self.gating == "none" else nn.Linear(hidden, width, bias=False)

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
        """As of `Rwkv7Mixer`; there is no value of a defining layer, and `v_first` is given back as it came."""
        if segment_ids is not None and state is not None:
            raise ValueError("state: packed sequences start without a past; leave out segment_ids or state")
        starts = sequence_starts(mask, segment_ids)
        inputs = self._inputs(h, starts, None if state is None else state[0])
        r, k, v = self.project(inputs["r"], inputs["k"], inputs["v"], position_embeddings)
        decay = (self.w0 + torch.tanh(inputs["w"] @ self.w1) @ self.w2).clamp(max=FASTEST_DECAY)
        operands = [self.split(value).to(r.dtype) for value in (r, k, v, decay)]
        y_BTHN, memory = recur(
            self.operator, wkv6_step, operands, [self.u.to(r.dtype)], None if state is None else state[1], mask,
            None if segment_ids is None else starts, return_state,
        )  # fmt: skip
        gate = None if self.gate is None else F.silu(self.gate(inputs["g"])) + (self.gating == "residual")
        if self.ln_x is not None:
            gate = None if gate is None else gate.to(y_BTHN.dtype)
            y = tmix_out(y_BTHN, gn_w=self.ln_x.weight, gn_b=self.ln_x.bias, gate=gate, eps=self.ln_x.eps).flatten(2)
        else:
            y = y_BTHN.flatten(2) * self.scale
            y = y if gate is None else y * gate
        after = None if memory is None else (last(h, mask, None if state is None else state[0]), memory)
        return self.output(y.to(h.dtype)), v_first, after

    def _inputs(self, h: Tensor, starts: Tensor | None, first: Tensor | None) -> dict[str, Tensor]:
        """Every input mixed with the token before by weights of its own, which a low-rank map of the token moves."""
        if not self.token_shift:
            return dict.fromkeys(self.inputs, h)
        difference = previous(h, starts, first) - h
        weights: dict[str, Tensor] = {name: getattr(self, f"x_{name}") for name in ("x", *self.inputs)}
        base = h + difference * weights["x"].to(h.dtype)
        low = torch.tanh(base @ self.m1).unflatten(-1, (len(self.inputs), MIX_RANK))
        moved = torch.einsum("btmr,mrd->mbtd", low, self.m2.to(low.dtype))
        return {name: h + difference * (weights[name] + offset).to(h.dtype) for name, offset in zip(self.inputs, moved)}
