"""Keys and values picked by place, the keys rotated to positions of their own. B batch, G heads, T places, N picked, C positions, d head size."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.beacon.rope_gather import binding, reference
from kernels_cuda.beacon.tables import DTYPES, check_tables, looked_at

__all__ = ["rope_gather"]


def rope_gather(k: Tensor, v: Tensor, src: Tensor, pos: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Keys k[b, :, src[b, n]] rotated to position pos[b, n], and their values: both [B, G, N, d].

    k, v: [B, G, T, d], unrotated; float32, bfloat16, float64, or float16 (always computed by the reference). src: int64 [B, N], the place
    of each entry, below 0 for zeros; pos: int64 [B, N], a row of the tables. cos, sin: [C, d/2], of pairs (j, j + d/2), float32 (float64
    for float64), with any scaling of attention folded in. Arithmetic is float32 (float64) with one rounding. k and v are
    differentiable; what a place gives several times is added in the order of the entries, so gradients have the same bits every time.

    A place or position outside its range raises ValueError on a CPU. Nobody waits for a GPU to look: there its entry is NaN.
    Raises ValueError for shapes, dtypes or devices that do not fit.

    >>> k = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    >>> quarter = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    >>> rope_gather(k, k, torch.tensor([[1, 0, -1]]), torch.tensor([[0, 1, 1]]), *quarter)[0].tolist()
    [[[[0.0, 2.0], [0.0, 1.0], [0.0, 0.0]]]]
    """
    check.dtype("k", k, DTYPES)
    check.shapes(k=(k, "BGTd"), v=(v, "BGTd"), src=(src, "BN"), pos=(pos, "BN"), cos=(cos, "Ch"), sin=(sin, "Ch"))
    check.same("dtype", k=k, v=v)
    for name, index in (("src", src), ("pos", pos)):
        check.dtype(name, index, (torch.int64,))
    check.same("device", k=k, v=v, src=src, pos=pos, cos=cos, sin=sin)
    check_tables(k, cos, sin)
    if looked_at(src):
        if (last := int(src.max())) >= k.shape[2]:
            check.fail("src", last, f"is beyond the {k.shape[2]} places", "use 0 to that less 1, or -1 for zeros")
        if int(pos.min()) < 0 or (last := int(pos.max())) >= len(cos):
            check.fail("pos", min(int(pos.min()), 0) or last, f"is beyond the {len(cos)} positions", "give longer tables")
    if k.dtype == torch.float16 or not choice.library(binding.OP, k.device.type):
        return reference.rope_gather(k, v, src, pos, cos, sin)
    rows = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    out: tuple[Tensor, Tensor] = binding.forward(*rows, src.contiguous(), pos.contiguous(), cos.contiguous(), sin.contiguous())
    return out
