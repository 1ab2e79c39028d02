"""The op for torch: its schema."""

from __future__ import annotations

import torch

OP = "lowrank/quantize_blockwise"

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("lowrank", "lowrank_emulated"):
    torch.library.define(
        f"{_library}::quantize_blockwise",
        "(Tensor x, Tensor code, Tensor(a!) codes, Tensor(b!) absmax, int columns, int block, bool nonzero) -> ()",
    )
