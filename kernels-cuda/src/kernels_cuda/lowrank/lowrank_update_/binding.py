"""The op for torch: the schema, and the loop over rows. m rows and n columns of a weight, r rank; R rows of a chunk."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from kernels_cuda.build import build

OP = "lowrank/lowrank_update_"

# Size of back(N) on its way into a weight, so that it stays in a cache.
SLICE_BYTES = {"cpu": 2**21, "cuda": 2**26}

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("lowrank", "lowrank_emulated"):
    torch.library.define(
        f"{_library}::lowrank_write_",
        "(Tensor(a!) weight, Tensor back, float decay, float alpha, int seed, int offset, int first) -> ()",
    )

# products on the CPU (products.h), where `multiplies`
torch.library.define("lowrank::lowrank_project_", "(Tensor(a!) low, Tensor basis, Tensor matrix, bool add, bool halves) -> ()")
torch.library.define(
    "lowrank::lowrank_product_",
    "(Tensor(a!) weight, Tensor left, Tensor right, float decay, float alpha, int seed, int offset, bool halves) -> ()",
)


@cache
def products() -> int:
    """What the build for this processor multiplies: nothing (0), float32 numbers (1), bfloat16 ones as well (2)."""
    return int(ctypes.CDLL(str(build(OP, "cpu"))).kernels_lowrank_products())


def multiplies(library: str, device: str, halves: bool) -> bool:
    """Whether `library` of torch.ops has products.h's products for tensors on `device` ("cpu", "cuda", ...)."""
    return library == "lowrank" and device == "cpu" and products() > halves


multiplies._dynamo_marked_constant = True  # type: ignore[attr-defined]


def update(
    library: str, W_mn: Tensor, left_mr: Tensor, right_rn: Tensor, alpha: float, decay: float, seed: int, offset: int, halves: bool
) -> None:
    """A contiguous W <- decay W - alpha left right, the product being one of bfloat16 numbers if `halves`."""
    if W_mn.numel() > 0 and multiplies(library, W_mn.device.type, halves):
        torch.ops.lowrank.lowrank_product_(W_mn, left_mr, right_rn, decay, alpha, seed, offset, halves)
        return
    product = torch.bfloat16 if halves else torch.float32
    left_mr, right_rn = left_mr.to(product), right_rn.to(product)
    if W_mn.dtype == left_mr.dtype == torch.float32:
        W_mn.addmm_(left_mr, right_rn, beta=decay, alpha=-alpha)
        return
    rows, columns = W_mn.shape
    size = max(1, SLICE_BYTES[W_mn.device.type] // (left_mr.element_size() * max(columns, 1)))
    buffer_Rn = left_mr.new_empty(min(size, rows), columns)
    for start in range(0, rows, size):
        part_Rn = W_mn[start : start + size]
        back_Rn = torch.mm(left_mr[start : start + size], right_rn, out=buffer_Rn[: len(part_Rn)])
        getattr(torch.ops, library).lowrank_write_(part_Rn, back_Rn, decay, alpha, seed, offset, start * columns)
