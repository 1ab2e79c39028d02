"""The op for torch: its schema."""

from __future__ import annotations

import torch

OP = "lowrank/dequantize_blockwise"

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("lowrank", "lowrank_emulated"):
    torch.library.define(
        f"{_library}::dequantize_blockwise",
        "(Tensor codes, Tensor absmax, Tensor code, Tensor(a!) values, int columns, int block) -> ()",
    )
