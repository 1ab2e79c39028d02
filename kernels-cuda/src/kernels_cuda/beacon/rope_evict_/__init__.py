"""Entries removed from the middle of a memory, the tail moving down to positions of its own. B batch, G heads, C capacity, d head size."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.beacon.rope_evict_ import binding, reference
from kernels_cuda.beacon.tables import DTYPES, check_dense, check_tables, looked_at

__all__ = ["rope_evict_"]


def rope_evict_(k_mem: Tensor, v_mem: Tensor, mem_len: Tensor, first: Tensor, count: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Remove entries first[b] to first[b] + count[b] - 1 of row b: those behind move down, their keys rotated by -count[b].

    k_mem, v_mem: [B, G, C, d], rotated; float32, bfloat16, float64, or float16 (always computed by the reference). mem_len, first, count:
    int32 [B]; mem_len falls by count. cos, sin: [L, d/2] with L above every count, of pairs (j, j + d/2), float32 (float64 for float64),
    without scaling of attention, which the keys have already. What lies behind the new end stays as it was.

    A range that memory does not hold raises ValueError on a CPU; on a GPU, which nobody waits for, the device's assertion fails at the
    next point where somebody does. Raises ValueError for shapes, dtypes or devices that do not fit.

    >>> keys, length = torch.tensor([[[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]]]), torch.tensor([3], dtype=torch.int32)
    >>> one, cos, sin = torch.ones(1, dtype=torch.int32), torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    >>> rope_evict_(keys, torch.zeros_like(keys), length, one, one, cos, sin)
    >>> keys[:, :, :2].tolist(), length.tolist()
    ([[[[1.0, 0.0], [0.0, -3.0]]]], [2])
    """
    check.dtype("k_mem", k_mem, DTYPES)
    check.shapes(k_mem=(k_mem, "BGCd"), v_mem=(v_mem, "BGCd"), mem_len=(mem_len, "B"), first=(first, "B"), count=(count, "B"))
    check.shapes(cos=(cos, "Lh"), sin=(sin, "Lh"))
    check.same("dtype", k_mem=k_mem, v_mem=v_mem)
    check_tables(k_mem, cos, sin)
    for name, number in (("mem_len", mem_len), ("first", first), ("count", count)):
        check.dtype(name, number, (torch.int32,))
    check.same("device", k_mem=k_mem, v_mem=v_mem, mem_len=mem_len, first=first, count=count, cos=cos, sin=sin)
    check_dense(k_mem=k_mem, v_mem=v_mem)
    held = (first >= 0) & (count >= 0) & (first + count <= mem_len) & (mem_len <= k_mem.shape[2]) & (count < max(1, len(cos)))
    if looked_at(held):
        if not bool(held.all()):
            b = int(held.int().argmin())
            about = f"{int(count[b])} entries from {int(first[b])} of row {b}"
            check.fail("count", about, f"are not in its {int(mem_len[b])} entries and {len(cos)} angles", "give others")
    elif held.device.type == "cuda":
        torch._assert_async(held.all(), "rope_evict_: first or count is out of range")
    if k_mem.dtype == torch.float16 or not (library := choice.library(binding.OP, k_mem.device.type)):
        reference.move(k_mem, v_mem, mem_len, first, count, cos, sin)
    else:
        numbers = (x.contiguous() for x in (mem_len, first, count, cos, sin))
        getattr(torch.ops, library).rope_evict_(k_mem, v_mem, *numbers)
    mem_len -= count
