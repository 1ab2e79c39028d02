"""Initial weights of a mixer: projections copied from the teacher's attention, the rest as in RWKV-7.

D hidden size, A query heads x head width, L layers; i the index of a layer, f = channel / D, q = 1 - i / L, depth = i / (L - 1).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rwkv_distill.mixers import Rwkv6Mixer, Rwkv7Mixer

if TYPE_CHECKING:
    from rwkv_distill.hf.base_rwkv_distill import TimeMixer


@torch.no_grad()
def initialise(
    mixer: TimeMixer, attention: Any, num_layers: int, *, init: Literal["copy", "random"], token_shift: Literal["zero", "rwkv"]
) -> None:
    """Give every parameter of `mixer` its initial value; random ones come from torch's generator."""
    if init == "copy":
        copy_projections(mixer, attention)
    else:
        for layer in (mixer.receptance, mixer.key, mixer.value, mixer.output):
            layer.reset_parameters()
    for norm in (mixer.r_norm, mixer.k_norm):
        if norm is not None:
            norm.reset_parameters()
    if mixer.r_norm is not None and mixer.k_norm is not None and init == "copy":
        mixer.r_norm.weight.copy_(attention.q_norm.weight)
        mixer.k_norm.weight.copy_(attention.k_norm.weight)
    if mixer.ln_x is not None:
        mixer.ln_x.reset_parameters()
    if isinstance(mixer, Rwkv7Mixer):
        _vectors(mixer, num_layers, token_shift)
        _low_rank(mixer)
    elif isinstance(mixer, Rwkv6Mixer):
        _version_6(mixer, num_layers, token_shift)


def copy_projections(mixer: TimeMixer, attention: Any) -> None:
    """Queries become receptances; shared keys and values are repeated where every head of the student has its own."""
    pairs = ((mixer.receptance, attention.q_proj), (mixer.key, attention.k_proj), (mixer.value, attention.v_proj))
    for mine, theirs in (*pairs, (mixer.output, attention.o_proj)):
        mine.weight.copy_(repeated(theirs.weight, mine.out_features, mixer.head_width))
        if mine.bias is not None:
            mine.bias.copy_(repeated(theirs.bias, mine.out_features, mixer.head_width))


def repeated(rows: Tensor, size: int, head_width: int) -> Tensor:
    """Rows of a projection, every head repeated so often in place that there are `size` rows: query head h uses key head h // repeats."""
    if len(rows) == size:
        return rows
    heads = rows.view(-1, head_width, *rows.shape[1:])
    return heads.repeat_interleave(size // len(rows), 0).flatten(0, 1)


def _vectors(mixer: Rwkv7Mixer, num_layers: int, token_shift: str) -> None:
    """Token shift, decay and the scales of keys (Peng et al. 2025, appendix; the formulas of RWKV-LM)."""
    depth, left, f = _place(mixer, num_layers)
    if mixer.token_shift:
        shift = {
            "r": 1 - f ** (0.2 * left),
            "w": 1 - f ** (0.9 * left),
            "a": 1 - f ** (0.9 * left),
            "k": 1 - (f ** (0.9 * left) + 0.4 * depth),
            "v": 1 - (f ** (0.4 * left) + 0.6 * depth),
            "g": torch.ones_like(f),
        }
        for name, value in shift.items():
            if hasattr(mixer, f"x_{name}"):
                getattr(mixer, f"x_{name}").copy_(value if token_shift == "rwkv" else 0 * value)
    width = mixer.w0.numel()
    along = torch.arange(width, dtype=torch.float64) / (width - 1)
    mixer.w0.copy_(-7 + 5 * along ** (0.85 + math.sqrt(depth)) + 0.5)
    mixer.a0.zero_()
    mixer.k_k.fill_(0.85)
    mixer.k_a.fill_(1)
    if mixer.value_residual:
        mixer.v0.fill_(1)
    if mixer.bonus:
        mixer.r_k.zero_()


def _place(mixer: TimeMixer, num_layers: int) -> tuple[float, float, Tensor]:
    """How deep a layer lies (0 to 1), q, and f of every channel."""
    depth = mixer.layer_index / (num_layers - 1) if num_layers > 1 else 0.0
    hidden = mixer.receptance.in_features
    return depth, 1 - mixer.layer_index / num_layers, torch.arange(hidden, dtype=torch.float64) / hidden


def _version_6(mixer: Rwkv6Mixer, num_layers: int, token_shift: str) -> None:
    """RWKV-6 (Peng et al. 2024, appendix; the formulas of RWKV-LM). A residual gate begins as a factor of one."""
    depth, left, f = _place(mixer, num_layers)
    if mixer.token_shift:
        shift = dict.fromkeys("xwk", 1 - f**left) | dict.fromkeys("rg", 1 - f ** (0.5 * left)) | {"v": 1 - f**left - 0.3 * depth}
        for name in ("x", *mixer.inputs):
            getattr(mixer, f"x_{name}").copy_(shift[name] if token_shift == "rwkv" else 0 * shift[name])
        for part in (mixer.m1, mixer.m2):
            nn.init.uniform_(part, -1e-4, 1e-4)
    for part in (mixer.w1, mixer.w2):
        nn.init.uniform_(part, -1e-4, 1e-4)
    place = torch.arange(mixer.w0.numel(), dtype=torch.float64)
    along = place / (len(place) - 1)
    mixer.w0.copy_(-6 + 5 * along ** (0.7 + 1.3 * depth))
    mixer.u.copy_((depth * (1 - along) + 0.1 * ((place + 1) % 3 - 1)).view_as(mixer.u))
    if mixer.gate is not None:
        mixer.gate.reset_parameters()
        if mixer.gating == "residual":
            mixer.gate.weight.zero_()


def _low_rank(mixer: Rwkv7Mixer) -> None:
    """One factor of every low-rank part starts at zero, the other orthogonal: nothing at first, and no two columns alike."""
    for name in ("w", "a", "v", "g"):
        if not hasattr(mixer, f"{name}1"):
            continue
        down, up = getattr(mixer, f"{name}1"), getattr(mixer, f"{name}2")
        zero, other = (up, down) if name == "g" and mixer.gate == "residual" else (down, up)
        zero.zero_()
        nn.init.orthogonal_(other, gain=0.1)
