"""The op for torch: the schema, and the loop over rows. m rows and n columns of a weight, r rank; R rows of a chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OP = "lowrank/lowrank_update_"

# Size of back(N) on its way into a weight, so that it stays in a cache.
SLICE_BYTES = {"cpu": 2**21, "cuda": 2**26}

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("lowrank", "lowrank_emulated"):
    torch.library.define(
        f"{_library}::lowrank_write_",
        "(Tensor(a!) weight, Tensor back, float decay, float alpha, int seed, int offset, int first) -> ()",
    )


def update(kernels: Any, W_mn: Tensor, left_mr: Tensor, right_rn: Tensor, alpha: float, decay: float, seed: int, offset: int) -> None:
    """A contiguous W <- decay W - alpha left right."""
    if W_mn.dtype == left_mr.dtype == torch.float32:
        W_mn.addmm_(left_mr, right_rn, beta=decay, alpha=-alpha)
        return
    rows, columns = W_mn.shape
    size = max(1, SLICE_BYTES[W_mn.device.type] // (left_mr.element_size() * max(columns, 1)))
    buffer_Rn = left_mr.new_empty(min(size, rows), columns)
    for start in range(0, rows, size):
        part_Rn = W_mn[start : start + size]
        back_Rn = torch.mm(left_mr[start : start + size], right_rn, out=buffer_Rn[: len(part_Rn)])
        kernels.lowrank_write_(part_Rn, back_Rn, decay, alpha, seed, offset, start * columns)
