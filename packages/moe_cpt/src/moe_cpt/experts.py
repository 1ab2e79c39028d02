"""The feed-forward layers of N experts over the tokens that a gate sent to each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels_cuda import choice
from kernels_cuda.moe import moe_ffn as fused

# R tokens, K experts per token, D hidden size, N experts, E neurons of an expert, G = R * K rows grouped by expert
Backend = Literal["auto", "fused", "grouped_mm", "loop"]


def moe_ffn(x_RD: Tensor, gate_up_NFD: Tensor, down_NDE: Tensor, idx_RK: Tensor, score_RK: Tensor, backend: Backend = "auto") -> Tensor:
    """Sum over a token's experts j of score * W_down[j] (silu(W_gate[j] x) * W_up[j] x), R x D.

    `gate_up_NFD` holds the 2E gate and up rows of every expert, in this order. Products run in autocast's type where autocast is on.
    Every expert gets a gradient, zero where no token came. Rows are added in a fixed order.
    """
    if x_RD.is_meta:
        return _evenly(x_RD, gate_up_NFD, down_NDE, score_RK)
    kind = x_RD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_RD.dtype
    with torch.autocast(kind, enabled=False):
        x_RD, gate_up_NFD, down_NDE = x_RD.to(dtype), gate_up_NFD.to(dtype), down_NDE.to(dtype)
        tokens, k = idx_RK.shape
        chosen = chosen_backend(backend, x_RD, down_NDE)
        if chosen == "fused":
            return fused(x_RD, gate_up_NFD, down_NDE, idx_RK, score_RK)
        flat = idx_RK.flatten()
        order_G = torch.argsort(flat, stable=True)
        inverse_G = torch.empty_like(order_G).scatter_(0, order_G, torch.arange(len(order_G), device=order_G.device))
        ends_N = torch.bincount(flat, minlength=len(gate_up_NFD)).cumsum(0)
        rows_GD, score_G1 = x_RD[order_G // k], score_RK.flatten()[order_G, None].to(dtype)
        run = _grouped if chosen == "grouped_mm" else _loop
        out_GD = run(rows_GD, score_G1, gate_up_NFD, down_NDE, ends_N)
        return out_GD[inverse_G].view(tokens, k, x_RD.shape[1]).sum(1)


def chosen_backend(backend: Backend, x_RD: Tensor, down_NDE: Tensor) -> Literal["fused", "grouped_mm", "loop"]:
    """What computes the experts.

    `auto` is `fused` where its kernels can be had, else `grouped_mm`. That one needs row lengths that are
    multiples of 16 bytes; `loop` takes what the others do not.
    """
    if backend == "loop" or x_RD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "loop"
    if backend == "fused" or (backend == "auto" and choice.library("moe/moe_ffn", x_RD.device.type)):
        return "fused"
    aligned = all(size * x_RD.element_size() % 16 == 0 for size in down_NDE.shape[1:])
    return "grouped_mm" if aligned and hasattr(F, "grouped_mm") else "loop"


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _loop(rows_GD: Tensor, score_G1: Tensor, gate_up_NFD: Tensor, down_NDE: Tensor, ends_N: Tensor) -> Tensor:
    ends = ends_N.tolist()
    out = []
    # unbind, since indexing would make a gradient of all experts for each one
    for gate_up, down, first, last in zip(gate_up_NFD.unbind(), down_NDE.unbind(), [0, *ends], ends):
        h = swiglu(F.linear(rows_GD[first:last], gate_up)) * score_G1[first:last]
        out.append(F.linear(h, down))
    return torch.cat(out)


def _grouped(rows_GD: Tensor, score_G1: Tensor, gate_up_NFD: Tensor, down_NDE: Tensor, ends_N: Tensor) -> Tensor:
    offsets = ends_N.to(torch.int32)
    h = swiglu(F.grouped_mm(rows_GD, gate_up_NFD.transpose(1, 2), offs=offsets)) * score_G1
    return F.grouped_mm(h, down_NDE.transpose(1, 2), offs=offsets)


def _evenly(x_RD: Tensor, gate_up_NFD: Tensor, down_NDE: Tensor, score_RK: Tensor) -> Tensor:
    """Shapes and FLOPs of the above on the meta device, which has no values to sort by: every expert gets the same number of rows."""
    experts, k = len(gate_up_NFD), score_RK.shape[1]
    each = -(-x_RD.shape[0] * k // experts)
    rows = x_RD.repeat(-(-each * experts // x_RD.shape[0]), 1)[: each * experts].view(experts, each, -1)
    out = torch.bmm(swiglu(torch.bmm(rows, gate_up_NFD.transpose(1, 2))), down_NDE.transpose(1, 2)).flatten(0, 1)
    return out[: x_RD.shape[0]] * score_RK.sum(1, keepdim=True).to(out.dtype)
