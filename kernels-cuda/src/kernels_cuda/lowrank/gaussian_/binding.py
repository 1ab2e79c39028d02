"""The op for torch: its schema."""

from __future__ import annotations

import torch

OP = "lowrank/gaussian_"

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("lowrank", "lowrank_emulated"):
    torch.library.define(f"{_library}::gaussian_", "(Tensor(a!) out, int seed, int param, int index) -> ()")
