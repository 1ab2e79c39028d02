"""The op for torch: its schema."""

from __future__ import annotations

import torch

OP = "lowrank/adam8bit_step_"

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("lowrank", "lowrank_emulated"):
    torch.library.define(
        f"{_library}::adam8bit_step_",
        "(Tensor L, Tensor(a!) mq, Tensor(b!) m_absmax, Tensor(c!) vq, Tensor(d!) v_absmax, Tensor code_s, Tensor code_u, Tensor(e!) out, "
        "float b1, float b2, float eps, int step, int columns, int block, float decay, float alpha) -> ()",
    )
