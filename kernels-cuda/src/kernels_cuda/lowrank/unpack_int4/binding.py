"""The op for torch: its schema, and that of a projection onto a packed basis."""

from __future__ import annotations

import torch

OP = "lowrank/unpack_int4"

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("lowrank", "lowrank_emulated"):
    torch.library.define(f"{_library}::unpack_int4", "(Tensor codes, Tensor scale, Tensor zero, Tensor(a!) out) -> ()")

# on the CPU (products.h), where `lowrank_update_` multiplies
torch.library.define(
    "lowrank::project_int4_", "(Tensor(a!) low, Tensor codes, Tensor scale, Tensor zero, Tensor matrix, bool add, bool halves) -> ()"
)
