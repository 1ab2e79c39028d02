"""The op for torch: its schema."""

from __future__ import annotations

import torch

OP = "beacon/rope_evict_"

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("beacon", "beacon_emulated"):
    torch.library.define(
        f"{_library}::rope_evict_",
        "(Tensor(a!) k_mem, Tensor(b!) v_mem, Tensor mem_len, Tensor first, Tensor count, Tensor cos, Tensor sin) -> ()",
    )
