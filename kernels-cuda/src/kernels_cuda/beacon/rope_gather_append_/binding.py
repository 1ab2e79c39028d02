"""The op for torch: its schema."""

from __future__ import annotations

import torch

OP = "beacon/rope_gather_append_"

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("beacon", "beacon_emulated"):
    torch.library.define(
        f"{_library}::rope_gather_append_",
        "(Tensor k, Tensor v, Tensor src, Tensor place, Tensor cos, Tensor sin, Tensor(a!) k_mem, Tensor(b!) v_mem) -> ()",
    )
