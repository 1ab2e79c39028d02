"""The op for torch: the schemas, and the loop over rows. m rows and n columns of a weight, r rank; R rows of a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda.lowrank.lowrank_update_.binding import SLICE_BYTES, multiplies

OP = "lowrank/channel_update_"

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("lowrank", "lowrank_emulated"):
    torch.library.define(f"{_library}::channel_squares_", "(Tensor gradient, Tensor factor, int axis, Tensor(a!) sums) -> ()")
    torch.library.define(
        f"{_library}::channel_write_",
        "(Tensor(a!) weight, Tensor? back, Tensor gradient, Tensor factor, int axis, float decay, float alpha, int seed, int offset, "
        "int first) -> ()",
    )

# with a product on the CPU (products.h), where `multiplies`
torch.library.define(
    "lowrank::channel_product_",
    "(Tensor(a!) weight, Tensor left, Tensor right, Tensor gradient, Tensor factor, int axis, float decay, float alpha, int seed, "
    "int offset, bool halves) -> ()",
)


def update(
    library: str,
    W_mn: Tensor,
    factors: tuple[Tensor, Tensor] | None,
    G_mn: Tensor,
    factor: Tensor,
    axis: int,
    alpha: float,
    decay: float,
    seed: int,
    offset: int,
    halves: bool,
) -> None:
    """A contiguous W <- decay W - alpha (left right + factor G), the product being one of bfloat16 numbers if `halves`."""
    write = getattr(torch.ops, library).channel_write_
    if factors is None:
        write(W_mn, None, G_mn, factor, axis, decay, alpha, seed, offset, 0)
        return
    if multiplies(library, W_mn.device.type, halves):
        torch.ops.lowrank.channel_product_(W_mn, *factors, G_mn, factor, axis, decay, alpha, seed, offset, halves)
        return
    left_mr, right_rn = (one.to(torch.bfloat16 if halves else torch.float32) for one in factors)
    rows, columns = W_mn.shape
    size = max(1, SLICE_BYTES[W_mn.device.type] // (left_mr.element_size() * max(columns, 1)))
    buffer_Rn = left_mr.new_empty(min(size, rows), columns)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        back_Rn = torch.mm(left_mr[part], right_rn, out=buffer_Rn[: len(W_mn[part])])
        own = factor[part] if axis == 0 and len(factor) > 1 else factor
        write(W_mn[part], back_Rn, G_mn[part], own, axis, decay, alpha, seed, offset, start * columns)
