"""The op for torch: schemas, the loop over chunks, shapes for tracing, gradients.

Matrix products are torch's; what lies between them is compiled (op.cpp, op.cu). A chunk's student logits turn into their gradient in
place and both products that need it follow at once; the teacher's logits live as briefly.

N rows, D hidden width of the student, V vocabulary; R rows of a chunk; K ids of a cached teacher, B buckets: those ids and all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels_cuda import check, choice
from kernels_cuda.head.chunks import WeightGradient, check_labels
from kernels_cuda.head.linear_kl.reference import IGNORED, is_cache, with_rest

OP = "head/linear_kl"
DIRECTIONS = ("forward", "reverse", "adaptive")  # in the order of op.h

# emulated: the same functions from the CUDA sources run on the CPU
for _library in ("head", "head_emulated"):
    torch.library.define(
        f"{_library}::kl_gradient_",
        "(Tensor(a!) student, Tensor teacher, Tensor? mask, Tensor? labels, Tensor scales, Tensor(b!) kl, Tensor(c!) ce,"
        " float temperature, int direction, bool gradient) -> ()",
    )
    torch.library.define(f"{_library}::log_sums_", "(Tensor logits, Tensor(a!) sums) -> ()")
    torch.library.define(f"{_library}::scale_softmax_", "(Tensor(a!) logits, Tensor sums, Tensor factors) -> ()")


@torch.library.custom_op("head::linear_kl", mutates_args=())
def fused(
    h_s: Tensor,
    W_s: Tensor,
    teacher: Sequence[Tensor],
    mask: Tensor | None,
    labels: Tensor | None,
    vocabulary: int,
    tau: float,
    direction: str,
    kl_w: float,
    ce_w: float,
    chunk: int,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, divergence, cross entropy, and the gradients asked for (the others are empty)."""
    with torch.autocast(h_s.device.type, enabled=False):
        return _fused(h_s, W_s, teacher, mask, labels, vocabulary, tau, direction, kl_w, ce_w, chunk, hidden_gradient, weight_gradient)


def _fused(
    h_s_ND: Tensor,
    W_s: Tensor,
    teacher: Sequence[Tensor],
    mask_N: Tensor | None,
    labels_N: Tensor | None,
    vocabulary: int,
    tau: float,
    direction: str,
    kl_w: float,
    ce_w: float,
    chunk: int,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = getattr(torch.ops, choice.library(OP, h_s_ND.device.type))
    num_rows, wide = len(h_s_ND), torch.promote_types(h_s_ND.dtype, torch.float32)
    labels_N = None if labels_N is None else labels_N.long()
    kl_N, ce_N = h_s_ND.new_zeros(2, num_rows, dtype=wide)
    num_kl = kl_N.new_tensor(num_rows) if mask_N is None else mask_N.sum()
    num_ce = kl_N.new_tensor(0) if labels_N is None else (labels_N != IGNORED).sum()
    counts = torch.stack([num_kl.to(wide), num_ce.to(wide)]).clamp_min(1)
    weights = kl_N.new_tensor([kl_w, ce_w])
    grad_h_ND = h_s_ND.new_zeros(h_s_ND.shape if hidden_gradient else 0)
    grad_W = WeightGradient(W_s) if weight_gradient else None

    W_s_VD = W_s[:vocabulary]
    rows_N = _rows_that_count(mask_N, labels_N, num_rows, vocabulary, h_s_ND.device)
    buffer_RV = h_s_ND.new_empty(min(chunk, len(rows_N)), vocabulary)
    side = _cached(teacher, vocabulary, wide) if is_cache(teacher) else _Live(teacher, vocabulary, wide, len(buffer_RV))
    settings = _Settings(weights / counts, tau, DIRECTIONS.index(direction), hidden_gradient or weight_gradient)
    for rows_R in rows_N.split(chunk):
        student_RV = buffer_RV[: len(rows_R)]
        h_s_RD = h_s_ND.index_select(0, rows_R)
        torch.mm(h_s_RD, W_s_VD.t(), out=student_RV)
        mask_R, labels_R = (None if value is None else value.index_select(0, rows_R) for value in (mask_N, labels_N))
        kl_R, ce_R = kl_N.new_zeros(2, len(rows_R))
        side.replace_by_gradient(kernels, student_RV, rows_R, mask_R, labels_R, kl_R, ce_R, settings)
        kl_N.index_copy_(0, rows_R, kl_R)
        ce_N.index_copy_(0, rows_R, ce_R)
        if hidden_gradient:
            grad_h_ND.index_copy_(0, rows_R, torch.mm(student_RV, W_s_VD))
        if grad_W is not None:
            grad_W.add(student_RV, h_s_RD)
    means = torch.stack([kl_N.sum(), ce_N.sum()]) / counts
    # a part of weight zero is absent, also where it is infinite
    loss = (weights * means).where(weights != 0, 0).sum()
    return loss, means[0].clone(), means[1].clone(), grad_h_ND, W_s.new_empty(0) if grad_W is None else grad_W.total()


def _rows_that_count(mask_N: Tensor | None, labels_N: Tensor | None, num_rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """Numbers of the rows with a divergence or a label. On a GPU all rows, since finding out would wait for the device."""
    if device.type != "cpu":
        return torch.arange(num_rows, device=device)
    if labels_N is not None:
        check_labels(labels_N, vocabulary, IGNORED)
    if mask_N is None:
        return torch.arange(num_rows)
    return (mask_N if labels_N is None else mask_N | (labels_N != IGNORED)).nonzero().squeeze(1)


@dataclass(frozen=True)
class _Settings:
    """The same for all chunks."""

    scales: Tensor  # of one row's divergence and cross entropy in the loss
    tau: float
    direction: int
    gradient: bool


class _Live:
    """A teacher given as logits, or as hidden states and a head."""

    def __init__(self, teacher: Sequence[Tensor], vocabulary: int, wide: torch.dtype, chunk: int) -> None:
        self.teacher, self.vocabulary, self.wide = teacher, vocabulary, wide
        self.buffer_RV = teacher[0].new_empty(chunk, vocabulary) if len(teacher) == 2 else None

    def logits(self, rows_R: Tensor) -> Tensor:
        """[R, V] for these rows."""
        if self.buffer_RV is not None:
            out_RV = self.buffer_RV[: len(rows_R)]
            return torch.mm(self.teacher[0].index_select(0, rows_R), self.teacher[1][: self.vocabulary].t(), out=out_RV)
        return self.teacher[0].index_select(0, rows_R)[:, : self.vocabulary]

    def replace_by_gradient(
        self,
        kernels: Any,
        student_RV: Tensor,
        rows_R: Tensor,
        mask_R: Tensor | None,
        labels_R: Tensor | None,
        kl_R: Tensor,
        ce_R: Tensor,
        settings: _Settings,
    ) -> None:
        """Fills kl_R and ce_R, and turns the student's logits into their gradient."""
        teacher_RV = self.logits(rows_R)
        # kernels take a teacher of the student's type, or a float32 one
        if teacher_RV.dtype != student_RV.dtype:
            teacher_RV = teacher_RV.to(self.wide)
        kernels.kl_gradient_(
            student_RV,
            teacher_RV,
            mask_R,
            labels_R,
            settings.scales,
            kl_R,
            ce_R,
            settings.tau,
            settings.direction,
            settings.gradient,
        )


class _Cache:
    """A teacher of whom K ids and their log-probabilities are known, and how likely all others are together.

    A row becomes one over buckets, for which divergence and gradient are found as for any other row. The gradient of the last bucket is
    that of a log-sum: it is dealt to the others by their softmax.
    """

    def __init__(self, ids_NK: Tensor, log_p_NB: Tensor) -> None:
        self.ids_NK, self.log_p_NB = ids_NK, log_p_NB
        self.has_others = log_p_NB.shape[1] > ids_NK.shape[1]

    def replace_by_gradient(
        self,
        kernels: Any,
        student_RV: Tensor,
        rows_R: Tensor,
        mask_R: Tensor | None,
        labels_R: Tensor | None,
        kl_R: Tensor,
        ce_R: Tensor,
        settings: _Settings,
    ) -> None:
        """Fills kl_R and ce_R, and turns the student's logits into their gradient."""
        ids_RK, log_p_RB = self.ids_NK.index_select(0, rows_R), self.log_p_NB.index_select(0, rows_R)
        num_ids = ids_RK.shape[1]
        cross_entropy = None if labels_R is None else _CrossEntropy(student_RV, labels_R, settings.scales)
        known_RK = student_RV.gather(1, ids_RK).to(kl_R.dtype)
        student_RV.scatter_(1, ids_RK, -torch.inf)
        others_R = torch.empty_like(kl_R)
        kernels.log_sums_(student_RV, others_R)
        buckets_RB = torch.cat([known_RK, others_R[:, None]], dim=1)[:, : log_p_RB.shape[1]].contiguous()
        kernels.kl_gradient_(buckets_RB, log_p_RB, mask_R, None, settings.scales, kl_R, ce_R, 1.0, settings.direction, settings.gradient)
        of_known_RK = buckets_RB[:, :num_ids]
        of_others_R = buckets_RB[:, num_ids] if self.has_others else torch.zeros_like(kl_R)
        if cross_entropy is not None:
            log_sum_R = torch.logaddexp(known_RK.logsumexp(1), others_R)
            ce_R.copy_(cross_entropy.values(log_sum_R))
            of_known_RK = of_known_RK + cross_entropy.of(known_RK, log_sum_R[:, None])
            of_others_R = of_others_R + cross_entropy.of(others_R[:, None], log_sum_R[:, None]).squeeze(1)
        if settings.gradient:
            kernels.scale_softmax_(student_RV, others_R, of_others_R.contiguous())
            student_RV.scatter_(1, ids_RK, of_known_RK.to(student_RV.dtype))
            if cross_entropy is not None:
                cross_entropy.subtract_labels(student_RV)


class _CrossEntropy:
    """What the labels of a chunk add where the row is cut into buckets."""

    def __init__(self, student_RV: Tensor, labels_R: Tensor, scales: Tensor) -> None:
        vocabulary = student_RV.shape[1]
        self.labelled_R = labels_R != IGNORED
        self.index_R1 = labels_R.clamp(0, vocabulary - 1)[:, None]
        self.logits_R = student_RV.gather(1, self.index_R1).squeeze(1).to(scales.dtype)
        # on a GPU nobody looks at the labels in time to raise
        nowhere_R = self.labelled_R & (labels_R != self.index_R1.squeeze(1))
        self.logits_R = self.logits_R.masked_fill(nowhere_R, torch.nan)
        self.scale_R = torch.where(self.labelled_R, scales[1], 0).masked_fill(nowhere_R, torch.nan)

    def values(self, log_sum_R: Tensor) -> Tensor:
        """The cross entropy of each row."""
        return (log_sum_R - self.logits_R).where(self.labelled_R, 0)

    def of(self, logits: Tensor, log_sum: Tensor) -> Tensor:
        """The gradient's softmax at logits [R, .]."""
        return self.scale_R[:, None] * (logits - log_sum).exp()

    def subtract_labels(self, gradient_RV: Tensor) -> None:
        """The rest of the gradient."""
        gradient_RV.scatter_add_(1, self.index_R1, -self.scale_R[:, None].to(gradient_RV.dtype))


def _cached(teacher: Sequence[Tensor], vocabulary: int, wide: torch.dtype) -> _Cache:
    ids_NK, logp_NK, rest_N = teacher
    if not ids_NK.is_cuda and ids_NK.numel():
        lowest, highest = int(ids_NK.min()), int(ids_NK.max())
        if lowest < 0 or highest >= vocabulary:
            bad = lowest if lowest < 0 else highest
            check.fail("teacher ids", bad, f"is outside the {vocabulary} columns that count", "leave such ids out of the cache")
    return _Cache(ids_NK.long(), with_rest(logp_NK.to(wide), rest_N.to(wide), vocabulary))


@fused.register_fake
def _(
    h_s: Tensor,
    W_s: Tensor,
    teacher: Sequence[Tensor],
    mask: Tensor | None,
    labels: Tensor | None,
    vocabulary: int,
    tau: float,
    direction: str,
    kl_w: float,
    ce_w: float,
    chunk: int,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, kl, ce = (h_s.new_empty((), dtype=torch.promote_types(h_s.dtype, torch.float32)) for _ in range(3))
    return loss, kl, ce, h_s.new_empty(h_s.shape if hidden_gradient else 0), W_s.new_empty(W_s.shape if weight_gradient else 0)


@register_flop_formula(torch.ops.head.linear_kl)
def _(h_s: tuple[int, int], W_s: Any, teacher: Sequence[tuple[int, ...]], *rest: Any, **_: Any) -> int:
    """From shapes: one product, one for each gradient, and one for a teacher that is a head."""
    vocabulary, *_settings, hidden_gradient, weight_gradient = rest[2:]
    widths = h_s[1] * (1 + hidden_gradient + weight_gradient) + (teacher[0][1] if len(teacher) == 2 else 0)
    flops: int = 2 * h_s[0] * widths * vocabulary
    return flops


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.num_teacher = len(inputs[2])
    ctx.save_for_backward(*output[3:])


def _backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    check.refuse_second_derivative("linear_kl")
    hidden, weight, *_ = ctx.needs_input_grad
    grad_h, grad_W = ctx.saved_tensors
    if gradient is None:
        hidden = weight = False
    nothing = [None] * ctx.num_teacher
    return grad_h * gradient if hidden else None, grad_W * gradient if weight else None, nothing, *(None,) * 10


fused.register_autograd(_backward, setup_context=_save)
