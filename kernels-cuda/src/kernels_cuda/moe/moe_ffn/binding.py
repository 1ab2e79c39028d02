"""The op for torch: schemas, memory, the order of products, shapes for tracing, gradients.

Matrix products are torch's; what lies between them is compiled (op.cpp, op.cu). T tokens, K experts of a token, R = T K rows grouped
by expert, D hidden size, N experts, E neurons of an expert, F = 2 E, C rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels_cuda import check, choice

OP = "moe/moe_ffn"

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("moe", "moe_emulated"):
    torch.library.define(
        f"{_library}::sort_tokens_", "(Tensor experts, Tensor(a!) counts, Tensor(b!) order, Tensor(c!) inverse, Tensor(d!) ends) -> ()"
    )
    torch.library.define(f"{_library}::swiglu_score_", "(Tensor gate_up, Tensor score, Tensor(a!) h) -> ()")
    torch.library.define(
        f"{_library}::swiglu_score_backward_",
        "(Tensor gate_up, Tensor score, Tensor dh, Tensor(a!) h, Tensor(b!) dgate_up, Tensor(c!) dscore) -> ()",
    )
    torch.library.define(f"{_library}::combine_", "(Tensor(a!) out, Tensor rows, Tensor inverse, int first, bool add) -> ()")

SORT_ROWS = 256  # as in op.h


def sort_workspace(rows: int, num_experts: int) -> tuple[int, int]:
    """Shape of the numbers that the sort works with."""
    return -(-rows // SORT_ROWS), num_experts


@torch.library.custom_op("moe::moe_ffn", mutates_args=())
def forward(
    x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, score: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result, and what backward needs: products of the first layer [R, F]; order, inverse [T, K] and scores of the rows; ends [N]."""
    kernels = getattr(torch.ops, choice.library(OP, x.device.type))
    (tokens, slots), (num_experts, width, _) = experts.shape, gate_up.shape
    if x.device.type == "cpu" and experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < num_experts:
        check.fail("experts", f"{int(experts.min())} to {int(experts.max())}", f"are not all of {num_experts} experts", "use 0 to N - 1")
    rows = tokens * slots
    order_R, inverse_R, counts = (x.new_empty(size, dtype=torch.int32) for size in (rows, rows, sort_workspace(rows, num_experts)))
    ends_N = x.new_empty(num_experts, dtype=torch.int32)
    kernels.sort_tokens_(experts.int().contiguous().flatten(), counts, order_R, inverse_R, ends_N)
    inverse_TK, score_R = inverse_R.view(tokens, slots), score.flatten().index_select(0, order_R)
    token_R, x = _tokens(order_R, slots), x.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        if _grouped(x, down):
            h_RE = x.new_empty(rows, width // 2)
            first_RF = F.grouped_mm(x.index_select(0, token_R), gate_up.contiguous().transpose(1, 2), offs=ends_N)
            kernels.swiglu_score_(first_RF, score_R, h_RE)
            y_TD = x.new_empty(tokens, x.shape[1])
            kernels.combine_(y_TD, F.grouped_mm(h_RE, down.contiguous().transpose(1, 2), offs=ends_N), inverse_TK, 0, False)
            return y_TD, first_RF, order_R, inverse_TK, score_R, ends_N
        # expert by expert: what lies between two products then stays in the cache
        first_RF, (y_TD, z_RD) = x.new_empty(rows, width), _sums(x, rows)
        for expert, at, (buffer_CD, h_CE) in _experts(ends_N, x, x.shape[1], width // 2):
            first_CF, z_CD = first_RF[at], buffer_CD if z_RD is None else z_RD[at]
            torch.index_select(x, 0, token_R[at], out=z_CD)
            torch.mm(z_CD, gate_up[expert].t(), out=first_CF)
            kernels.swiglu_score_(first_CF, score_R[at], h_CE)
            torch.mm(h_CE, down[expert].t(), out=z_CD)
            if z_RD is None:
                kernels.combine_(y_TD, z_CD, inverse_TK, at.start, True)
        if z_RD is not None:
            kernels.combine_(y_TD, z_RD, inverse_TK, 0, False)
    return y_TD, first_RF, order_R, inverse_TK, score_R, ends_N


@torch.library.custom_op("moe::moe_ffn_backward", mutates_args=())
def backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    first: Tensor,
    order: Tensor,
    inverse: Tensor,
    score: Tensor,
    ends: Tensor,
    x_gradient: bool,
    gate_up_gradient: bool,
    down_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up and down (those not asked for are empty), and of the scores [T, K]."""
    kernels = getattr(torch.ops, choice.library(OP, x.device.type))
    dy_TD, x_TD, token_R = dy.contiguous(), x.contiguous(), _tokens(order, inverse.shape[1])
    dscore_R = score.new_empty(score.shape)
    with torch.autocast(x.device.type, enabled=False):
        if _grouped(x, down):
            h_RE, dfirst_RF = first.new_empty(first.shape[0], down.shape[2]), first.new_empty(first.shape)
            dy_RD = dy_TD.index_select(0, token_R)
            kernels.swiglu_score_backward_(first, score, F.grouped_mm(dy_RD, down.contiguous(), offs=ends), h_RE, dfirst_RF, dscore_R)
            nobody_N11 = ends.diff(prepend=ends.new_zeros(1)).eq(0)[:, None, None]
            ddown_NDE = F.grouped_mm(dy_RD.t(), h_RE, offs=ends).masked_fill_(nobody_N11, 0) if down_gradient else down.new_empty(0)
            dx_TD, dgate_up_NFD = x.new_empty(x.shape if x_gradient else 0), gate_up.new_empty(0)
            if gate_up_gradient:
                dgate_up_NFD = F.grouped_mm(dfirst_RF.t(), x_TD.index_select(0, token_R), offs=ends).masked_fill_(nobody_N11, 0)
            if x_gradient:
                kernels.combine_(dx_TD, F.grouped_mm(dfirst_RF, gate_up.contiguous(), offs=ends), inverse, 0, False)
        else:
            dx_TD, z_RD = _sums(x, len(token_R)) if x_gradient else (x.new_empty(0), None)
            dgate_up_NFD, ddown_NDE = gate_up.new_zeros(0), down.new_zeros(0)
            if gate_up_gradient:
                dgate_up_NFD = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
            if down_gradient:
                ddown_NDE = torch.empty_like(down, memory_format=torch.contiguous_format)
            _, width, size = down.shape
            _zero_idle(ends, *(gradient for gradient in (dgate_up_NFD, ddown_NDE) if gradient.ndim == 3))
            for expert, at, (buffer_CD, x_CD, h_CE, dh_CE, dfirst_CF) in _experts(ends, x, width, width, size, size, 2 * size):
                dy_CD = buffer_CD if z_RD is None else z_RD[at]
                torch.index_select(dy_TD, 0, token_R[at], out=dy_CD)
                torch.mm(dy_CD, down[expert], out=dh_CE)
                kernels.swiglu_score_backward_(first[at], score[at], dh_CE, h_CE, dfirst_CF, dscore_R[at])
                if down_gradient:
                    torch.mm(dy_CD.t(), h_CE, out=ddown_NDE[expert])
                if gate_up_gradient:
                    torch.index_select(x_TD, 0, token_R[at], out=x_CD)
                    torch.mm(dfirst_CF.t(), x_CD, out=dgate_up_NFD[expert])
                if x_gradient:
                    torch.mm(dfirst_CF, gate_up[expert], out=dy_CD)
                    if z_RD is None:
                        kernels.combine_(dx_TD, dy_CD, inverse, at.start, True)
            if z_RD is not None:
                kernels.combine_(dx_TD, z_RD, inverse, 0, False)
    return dx_TD, dgate_up_NFD, ddown_NDE, dscore_R.index_select(0, inverse.flatten()).view(inverse.shape)


def _tokens(order_R: Tensor, slots: int) -> Tensor:
    return order_R.div(max(slots, 1), rounding_mode="floor")


def _grouped(x: Tensor, down: Tensor) -> bool:
    """All experts in one call of torch's grouped_mm. On a CPU that is a loop which leaves the cache between products; there it
    serves to test what a GPU does."""
    emulated = choice.library(OP, x.device.type).endswith("_emulated")
    aligned = all(size and size * x.element_size() % 16 == 0 for size in down.shape[1:])
    return (emulated or x.device.type == "cuda") and aligned and x.shape[0] > 0


def _experts(ends_N: Tensor, like: Tensor, *widths: int) -> Iterator[tuple[int, slice, list[Tensor]]]:
    """Each expert that has rows, where they are, and for each width that many rows to write to, the same memory for all experts."""
    ends = ends_N.tolist()
    spans = [slice(first, last) for first, last in zip([0, *ends], ends)]
    most = max((span.stop - span.start for span in spans), default=0)
    space = [like.new_empty(most, width) for width in widths]
    for expert, span in enumerate(spans):
        if span.stop > span.start:
            yield expert, span, [buffer[: span.stop - span.start] for buffer in space]


def _sums(x_TD: Tensor, rows: int) -> tuple[Tensor, Tensor | None]:
    """Where the rows of a token are added up, and memory for all rows where that moves less than adding them expert by expert.

    Adding moves a float32 sum in and out for every row; rows of half its width are cheaper to keep until all are there.
    """
    # dense, whatever the strides of x: the operators write row after row
    if x_TD.dtype == torch.float32:
        return x_TD.new_zeros(x_TD.shape), None
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(rows, x_TD.shape[1])


def _zero_idle(ends_N: Tensor, *gradients: Tensor) -> None:
    """Experts without rows have no gradient."""
    ends = ends_N.tolist()
    for expert, (first, last) in enumerate(zip([0, *ends], ends)):
        if first == last:
            for gradient in gradients:
                gradient[expert].zero_()


@forward.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = experts.shape[0] * experts.shape[1]
    order, ends = (x.new_empty(size, dtype=torch.int32) for size in (rows, gate_up.shape[0]))
    return (
        x.new_empty(x.shape),
        x.new_empty(rows, gate_up.shape[1]),
        order,
        x.new_empty(experts.shape, dtype=torch.int32),
        score.new_empty(rows),
        ends,
    )


@backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    first: Tensor,
    order: Tensor,
    inverse: Tensor,
    score: Tensor,
    ends: Tensor,
    x_gradient: bool,
    gate_up_gradient: bool,
    down_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    asked = (x, x_gradient), (gate_up, gate_up_gradient), (down, down_gradient)
    return *(value.new_empty(value.shape if wanted else 0) for value, wanted in asked), score.new_empty(inverse.shape)  # type: ignore[return-value]


@register_flop_formula(torch.ops.moe.moe_ffn)
def _(x: tuple[int, int], gate_up: Any, down: tuple[int, int, int], experts: tuple[int, int], *_: Any, **__: Any) -> int:
    """From shapes: three products of every row."""
    return 2 * 3 * experts[0] * experts[1] * down[1] * down[2]


@register_flop_formula(torch.ops.moe.moe_ffn_backward)
def _(
    dy: Any,
    x: Any,
    gate_up: Any,
    down: tuple[int, int, int],
    first: tuple[int, int],
    order: Any,
    inverse: Any,
    score: Any,
    ends: Any,
    x_gradient: bool,
    gate_up_gradient: bool,
    down_gradient: bool,
    **_: Any,
) -> int:
    return 2 * first[0] * down[1] * down[2] * (1 + 2 * x_gradient + 2 * gate_up_gradient + down_gradient)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate_up, down, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, gate_up, down, *output[1:])


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    check.refuse_second_derivative("moe_ffn")
    if dy is None:
        return (None,) * 5
    needed = ctx.needs_input_grad
    dx, dgate_up, ddown, dscore = backward(dy, *ctx.saved_tensors, *needed[:3])
    found = [gradient if wanted else None for gradient, wanted in zip((dx, dgate_up, ddown), needed)]
    return *found, None, dscore if needed[4] else None


forward.register_autograd(_backward, setup_context=_save)
