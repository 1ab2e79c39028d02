"""Keys and values appended to a memory, the keys rotated to their place in it. B batch, G heads, T places, N entries, C capacity, d head size."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.beacon.rope_gather_append_ import binding, reference
from kernels_cuda.beacon.tables import DTYPES, check_dense, check_tables, looked_at

__all__ = ["rope_gather_append_"]


def rope_gather_append_(k: Tensor, v: Tensor, src: Tensor, cos: Tensor, sin: Tensor, k_mem: Tensor, v_mem: Tensor, mem_len: Tensor) -> None:
    """Write k[b, :, src[b, n]], rotated by its index in memory, and its value behind the mem_len[b] entries of row b; advance mem_len.

    k, v: [B, G, T, d], unrotated; float32, bfloat16, float64, or float16 (always computed by the reference). src: int64 [B, N], the place
    of each entry, below 0 to skip it. cos, sin: [C', d/2] for indices of memory, of pairs (j, j + d/2), float32 (float64 for float64),
    with any scaling of attention folded in. k_mem, v_mem: [B, G, C, d] like k; mem_len: int32 [B]. Nothing else of the memory changes.

    A place out of range, or more entries than memory or tables hold, raise ValueError on a CPU; on a GPU, which nobody waits for, the
    device's assertion fails at the next point where somebody does. Raises ValueError for shapes, dtypes or devices that do not fit.

    >>> memory, length, k = torch.zeros(1, 1, 3, 2), torch.ones(1, dtype=torch.int32), torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    >>> cos, sin = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([[0.0], [1.0], [0.0]])
    >>> rope_gather_append_(k, k, torch.tensor([[1, -1, 0]]), cos, sin, memory, torch.zeros_like(memory), length)
    >>> memory.tolist(), length.tolist()
    ([[[[0.0, 0.0], [-2.0, 0.0], [-1.0, 0.0]]]], [3])
    """
    check.dtype("k", k, DTYPES)
    check.shapes(k=(k, "BGTd"), v=(v, "BGTd"), src=(src, "BN"), cos=(cos, "Lh"), sin=(sin, "Lh"))
    check.shapes(k=(k, "BGTd"), k_mem=(k_mem, "BGCd"), v_mem=(v_mem, "BGCd"), mem_len=(mem_len, "B"))
    check.same("dtype", k=k, v=v, k_mem=k_mem, v_mem=v_mem)
    check_tables(k, cos, sin)
    check.dtype("src", src, (torch.int64,))
    check.dtype("mem_len", mem_len, (torch.int32,))
    check.same("device", k=k, v=v, src=src, cos=cos, sin=sin, k_mem=k_mem, v_mem=v_mem, mem_len=mem_len)
    check_dense(k_mem=k_mem, v_mem=v_mem)
    kept = src >= 0
    place = torch.where(kept, mem_len[:, None] + kept.cumsum(1) - 1, -1)
    room = min(k_mem.shape[2], len(cos))
    if looked_at(src):
        if (last := int(src.max())) >= k.shape[2]:
            check.fail("src", last, f"is beyond the {k.shape[2]} places", "use 0 to that less 1, or -1 to skip")
        if (last := int(place.max())) >= room:
            check.fail("mem_len", last + 1, f"entries do not fit into the {room} of memory and tables", "give larger ones")
    elif src.device.type == "cuda":
        torch._assert_async(((src < k.shape[2]) & (place < room)).all(), "rope_gather_append_: src or mem_len is out of range")
    if k.dtype == torch.float16 or not (library := choice.library(binding.OP, k.device.type)):
        reference.write(k, v, src, place, cos, sin, k_mem, v_mem)
    else:
        rows = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        kernels = getattr(torch.ops, library)
        kernels.rope_gather_append_(*rows, src.contiguous(), place.contiguous(), cos.contiguous(), sin.contiguous(), k_mem, v_mem)
    mem_len += kept.sum(1, dtype=torch.int32)
