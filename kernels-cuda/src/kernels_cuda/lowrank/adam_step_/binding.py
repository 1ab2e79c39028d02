"""The op for torch: its schema."""

from __future__ import annotations

import torch

OP = "lowrank/adam_step_"

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("lowrank", "lowrank_emulated"):
    torch.library.define(
        f"{_library}::adam_step_",
        "(Tensor L, Tensor(a!) m, Tensor(b!) v, Tensor(c!) out, float b1, float b2, float eps, int step, float decay, float alpha) -> ()",
    )
