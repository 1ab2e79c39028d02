"""The op for torch: its schema."""

from __future__ import annotations

import torch

OP = "lowrank/pack_int4"

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("lowrank", "lowrank_emulated"):
    torch.library.define(f"{_library}::pack_int4", "(Tensor x, Tensor(a!) codes, Tensor(b!) scale, Tensor(c!) zero) -> ()")
