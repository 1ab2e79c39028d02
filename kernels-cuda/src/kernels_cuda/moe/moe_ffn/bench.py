"""Shapes to time, and what they are compared with. T tokens, K experts of a token, D hidden size, N experts, E neurons of an expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_cuda.bench import Shape
from kernels_cuda.moe import moe_ffn
from kernels_cuda.moe.moe_ffn.cases import make


def loop(x_TD: Tensor, gate_up_NFD: Tensor, down_NDE: Tensor, score_TK: Tensor, experts_TK: Tensor) -> Tensor:
    """What people write: expert by expert, gate and up apart, rows added to the result."""
    slots = experts_TK.shape[1]
    flat_R, order_R = experts_TK.flatten().sort()
    token_R = order_R.div(slots, rounding_mode="floor")
    sizes = flat_R.bincount(minlength=len(down_NDE)).tolist()
    parts = [
        F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
        for rows, (gate, up), down in zip(
            x_TD.index_select(0, token_R).split(sizes), (each.chunk(2) for each in gate_up_NFD.unbind()), down_NDE.unbind()
        )
    ]
    rows_RD = torch.cat(parts) * score_TK.flatten().index_select(0, order_R)[:, None].to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, token_R, rows_RD)


def grouped(x_TD: Tensor, gate_up_NFD: Tensor, down_NDE: Tensor, score_TK: Tensor, experts_TK: Tensor) -> Tensor:
    """torch's grouped_mm between plain operations."""
    order_R = torch.argsort(experts_TK.flatten(), stable=True)
    token_R = order_R.div(experts_TK.shape[1], rounding_mode="floor")
    ends_N = torch.bincount(experts_TK.flatten(), minlength=len(down_NDE)).cumsum(0).int()
    gate, up = F.grouped_mm(x_TD.index_select(0, token_R), gate_up_NFD.transpose(1, 2), offs=ends_N).chunk(2, -1)
    score_R1 = score_TK.flatten().index_select(0, order_R)[:, None].to(x_TD.dtype)
    rows_RD = F.grouped_mm(F.silu(gate) * up * score_R1, down_NDE.transpose(1, 2), offs=ends_N)
    return torch.zeros_like(x_TD).index_add(0, token_R, rows_RD)


def shape(tokens: int, slots: int, width: int, num_experts: int, size: int, dtype: torch.dtype) -> Shape:
    """Forward and backward."""
    rows, bytes_ = tokens * slots, dtype.itemsize
    return Shape(
        name=f"fwd+bwd  T={tokens} K={slots} D={width} N={num_experts} E={size}",
        dtype=dtype,
        make=lambda: make(dtype, tokens, slots, width, num_experts, size),
        function=moe_ffn,
        baseline=loop,
        baseline_name="a loop over experts",
        flops=3 * 2 * 3 * rows * width * size,
        # weights are read twice and their gradients written, x and the result go both ways, the first products are written and read
        bytes=bytes_ * (3 * 3 * num_experts * width * size + 5 * tokens * width + 4 * rows * size),
        peers={"torch's grouped_mm": grouped},
    )


SHAPES = [shape(2048, 4, 1024, 16, 176, dtype) for dtype in (torch.bfloat16, torch.float32)]
