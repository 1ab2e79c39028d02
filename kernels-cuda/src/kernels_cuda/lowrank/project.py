"""L of a gradient: its projection onto a low-rank basis. r rank, k the side that is projected, d the other one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.lowrank.lowrank_update_ import binding
from kernels_cuda.lowrank.unpack_int4 import binding as packed_binding
from kernels_cuda.lowrank.unpack_int4 import check_packed, unpack_int4


def project_accumulate_(L: Tensor, G: Tensor, P: Tensor, side: Literal["left", "right"], beta: float = 0.0) -> None:
    """L <- beta L + proj(G), with proj(G) = P G for side "left" and P G^T for side "right".

    L: [r, d], float32, contiguous; with beta 0 what it held is not read. G: [k, d] (left) or [d, k] (right), and P: [r, k], each float32
    or bfloat16. The product is one of bfloat16 numbers if P is bfloat16, else of float32 ones; sums are float32.

    Memory beyond the arguments: on CPUs with AVX-512 (with `avx512_bf16` for a product of bfloat16 numbers) parts of G and P that fit a
    cache; elsewhere a copy of G where it has another type than the product, and the product where it has another type than L.

    Raises ValueError for shapes, dtypes, devices or settings that do not fit.

    >>> L = torch.ones(1, 3)
    >>> project_accumulate_(L, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([[0.0, 1.0]]), "left", 0.5)
    >>> L.tolist()
    [[4.5, 5.5, 6.5]]
    """
    check.one_of("side", side, ("left", "right"))
    check.shapes(L=(L, "rd"), G=(G, "kd" if side == "left" else "dk"), P=(P, "rk"))
    check.dtype("L", L, (torch.float32,))
    check.dtype("G", G, (torch.float32, torch.bfloat16))
    check.dtype("P", P, (torch.float32, torch.bfloat16))
    check.same("device", L=L, G=G, P=P)
    matrix = G if side == "left" else G.t()
    library, halves = choice.library(binding.OP, L.device.type), P.dtype == torch.bfloat16
    if beta in (0, 1) and L.is_contiguous() and G.numel() > 0 and binding.multiplies(library, L.device.type, halves):
        matrix, basis = (one if 1 in one.stride() else one.contiguous() for one in (matrix, P))
        torch.ops.lowrank.lowrank_project_(L, basis, matrix, beta == 1, halves)
        return
    matrix = matrix.to(P.dtype)
    # the reference sums in float32; torch rounds a product of bfloat16 numbers once more
    product = torch.mm(P, matrix).float() if library else torch.mm(P.float(), matrix.float())
    L.copy_(product if beta == 0 else L.mul(beta).add_(product))


def project_int4(
    L: Tensor,
    G: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    side: Literal["left", "right"],
    beta: float = 0.0,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """`project_accumulate_` for a basis P that `pack_int4` has packed, rounded to `dtype` (float32 or bfloat16) before the product.

    Memory beyond the arguments: as there, and on CPUs with AVX-512 eight rows of P; elsewhere P.

    Raises ValueError for shapes, dtypes, devices or settings that do not fit.

    >>> from kernels_cuda.lowrank import pack_int4
    >>> L = torch.empty(1, 3)
    >>> project_int4(L, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), *pack_int4(torch.tensor([[0.0, 15.0]])), "left")
    >>> L.tolist()
    [[60.0, 75.0, 90.0]]
    """
    check.one_of("side", side, ("left", "right"))
    sizes = check.shapes(L=(L, "rd"), G=(G, "kd" if side == "left" else "dk"))
    check_packed(codes, scale, zero, sizes["r"] * sizes["k"])
    check.dtype("L", L, (torch.float32,))
    check.dtype("G", G, (torch.float32, torch.bfloat16))
    check.same("device", L=L, G=G, codes=codes)
    if dtype not in (torch.float32, torch.bfloat16):
        check.fail("dtype", dtype, "is not supported", "use torch.float32 or torch.bfloat16")
    library, halves = choice.library(packed_binding.OP, L.device.type), dtype == torch.bfloat16
    if beta in (0, 1) and L.is_contiguous() and L.numel() * G.numel() > 0 and binding.multiplies(library, L.device.type, halves):
        matrix = G if side == "left" else G.t()
        matrix = matrix if 1 in matrix.stride() else matrix.contiguous()
        torch.ops.lowrank.project_int4_(L, codes, scale, zero, matrix, beta == 1, halves)
    else:
        project_accumulate_(L, G, unpack_int4(codes, scale, zero, (sizes["r"], sizes["k"]), dtype), side, beta)
