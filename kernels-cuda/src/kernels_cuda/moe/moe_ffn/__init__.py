"""The feed-forward layers of N experts over the tokens that a router sent to each.

T tokens, K experts of a token, R = T K rows grouped by expert, D hidden size, N experts, E neurons of an expert, F = 2 E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.moe.moe_ffn import binding, reference

__all__ = ["moe_ffn"]


def moe_ffn(x_TD: Tensor, gate_up_NFD: Tensor, down_NDE: Tensor, experts_TK: Tensor, score_TK: Tensor) -> Tensor:
    """y[t] = sum over the experts j of token t of score * down[j] (silu(gate[j] x[t]) * (up[j] x[t])), T x D, in the dtype of x.

    gate_up_NFD holds the E gate rows and then the E up rows of every expert. x, gate_up and down share a dtype: float32, bfloat16,
    float16 or float64 (always computed by the reference). experts_TK is int64 or int32, score_TK any float type, used as float32. All but
    experts_TK are differentiable; every expert gets a gradient, zero where no token came. Sums have a fixed order.

    Backward needs x, the T K x 2 E products of the first layer, and a few numbers per row; the rest is computed anew, without
    matrix products. A CPU takes one expert after the other. A GPU takes all at once by torch's grouped_mm, without waiting for
    the device, where D and E are multiples of 16 bytes; else it has to learn from the device how many rows each expert has.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for experts outside 0 to N - 1; on a GPU, where looking
    would stall, such a number counts as the nearest expert.

    >>> x, ones = torch.tensor([[2.0]]), torch.ones(2, 1, 1)
    >>> moe_ffn(x, torch.full((2, 2, 1), 50.0), ones, torch.tensor([[1]]), torch.tensor([[0.5]])).item()
    5000.0
    """
    check.shapes(x=(x_TD, "TD"), gate_up=(gate_up_NFD, "NFD"), down=(down_NDE, "NDE"), experts=(experts_TK, "TK"), score=(score_TK, "TK"))
    if gate_up_NFD.shape[1] != 2 * down_NDE.shape[2]:
        check.fail(
            "gate_up", f"shape {tuple(gate_up_NFD.shape)}", f"does not fit E = {down_NDE.shape[2]} of down", "pass 2 E rows per expert"
        )
    check.dtype("x", x_TD, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    check.dtype("experts", experts_TK, (torch.int64, torch.int32))
    check.dtype("score", score_TK, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    check.same("dtype", x=x_TD, gate_up=gate_up_NFD, down=down_NDE)
    check.same("device", x=x_TD, gate_up=gate_up_NFD, down=down_NDE, experts=experts_TK, score=score_TK)
    if x_TD.dtype == torch.float64 or not choice.library(binding.OP, x_TD.device.type):
        return reference.moe_ffn(x_TD, gate_up_NFD, down_NDE, experts_TK, score_TK)
    y_TD: Tensor = binding.forward(x_TD, gate_up_NFD, down_NDE, experts_TK, score_TK.float())[0]
    return y_TD
