"""The op for torch: its schema, and the memory it writes to."""

from __future__ import annotations

import torch
from torch import Tensor

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
