"""The op for torch: its schema."""

from __future__ import annotations

import torch

OP = "mdm/noise_fixed_count"

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("mdm", "mdm_emulated"):
    torch.library.define(
        f"{_library}::mask_count", "(Tensor k, Tensor slot, Tensor? eligible, Tensor(a!) masked, int key, int stream) -> ()"
    )
