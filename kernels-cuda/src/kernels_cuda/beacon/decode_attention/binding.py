"""The op for torch: schemas, memory, shapes for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import choice

OP = "beacon/decode_attention"
SPLIT = 256  # keys that are read together; op.h knows it, too

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("beacon", "beacon_emulated"):
    torch.library.define(
        f"{_library}::decode_attention_",
        "(Tensor q, Tensor k_mem, Tensor v_mem, Tensor mem_len, Tensor k_raw, Tensor v_raw, Tensor raw_len, float scale, "
        "Tensor(a!) out, Tensor(b!) lse, Tensor(c!) parts, Tensor(d!) lses) -> ()",
    )


def buffers(q: Tensor, k_mem: Tensor, k_raw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, then what the splits of each head find before they are joined: q is B x G x each x d."""
    wide = torch.promote_types(q.dtype, torch.float32)
    splits = sum(-(-k.shape[2] // SPLIT) for k in (k_mem, k_raw))
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=wide)
    return out, lse, q.new_empty(*q.shape[:3], splits, q.shape[3], dtype=wide), q.new_empty(*q.shape[:3], splits, dtype=wide)


@torch.library.custom_op("beacon::decode_attention", mutates_args=())
def forward(
    q: Tensor, k_mem: Tensor, v_mem: Tensor, mem_len: Tensor, k_raw: Tensor, v_raw: Tensor, raw_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum of B x G x each queries; lengths are in their ranges, head dimensions dense."""
    out, lse, parts, lses = buffers(q, k_mem, k_raw)
    kernels = getattr(torch.ops, choice.library(OP, q.device.type))
    kernels.decode_attention_(q, k_mem, v_mem, mem_len, k_raw, v_raw, raw_len, scale, out, lse, parts, lses)
    return out, lse


@forward.register_fake
def _(
    q: Tensor, k_mem: Tensor, v_mem: Tensor, mem_len: Tensor, k_raw: Tensor, v_raw: Tensor, raw_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return buffers(q, k_mem, k_raw)[:2]
