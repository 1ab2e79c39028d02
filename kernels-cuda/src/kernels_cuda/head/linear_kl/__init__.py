"""Distillation of an output head in chunks of rows: divergence from a teacher and cross entropy, without the logits of the whole batch.

N rows (positions), D and E hidden widths of student and teacher, S and T rows of their heads, K ids of a cached teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.head.linear_kl import binding, reference

__all__ = ["linear_kl"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def linear_kl(
    h_s: Tensor,
    W_s: Tensor,
    teacher: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    tau: float = 1.0,
    direction: Literal["forward", "reverse", "adaptive"] = "forward",
    kl_w: float = 1.0,
    ce_w: float = 0.0,
    chunk: int = 256,
    *,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, kl, ce) of the student's logits h_s @ W_s.T: kl is the mean divergence from the teacher over the rows of `mask`, ce the
    mean cross entropy at temperature 1 over the rows whose label is not -100, and loss = kl_w kl + ce_w ce.

    With p = softmax(z_t / tau) and q = softmax(z_s / tau) over the columns that both sides have, a row's divergence is tau^2 times

        forward   sum p (log p - log q)
        reverse   sum q (log q - log p)
        adaptive  w forward + (1 - w) reverse, where w is the part of sum |p - q| that lies in the head set: the fewest most likely
                  values of p that hold half of its mass (of equal ones the first); 1/2 where p = q; no gradient flows through w

    h_s [N, D] and W_s [S, D]: float32, bfloat16 or float64, one dtype. Under autocast both are cast to its dtype.
    teacher: logits [N, T]; or a head (h_t [N, E], W_t [T, E]); or a cache (ids [N, K], logp [N, K], rest [N]) of a row's K different
    ids, their log-probabilities at temperature 1 (tau has to be 1) and the logarithm of the remaining mass. A cache is compared by its
    ids and one bucket for all others, which is absent where K is all columns; what was rounded for storing is made to sum to one.
    No gradient flows to the teacher. Its dtype may differ from the student's; a cache may also be float16.
    Columns min(S, T) and up are left out on both sides, and those from `vocabulary` on: give it with a cache whose teacher had fewer
    columns than the student.
    mask: bool or integer [N], None for all rows. labels: int64 or int32 [N], None for none. A mean over no rows is 0.
    chunk: rows whose logits exist at a time, once for the student and once for a teacher given as a head.

    The loss is float32 (float64 for float64), and so are kl and ce, which are for looking at and carry no gradient. Gradients are
    computed together with the loss and held until backward; what does not require one costs nothing, nor do rows without mask and
    label on a CPU.

    Raises ValueError for shapes, dtypes, devices or settings that do not fit, and for labels and ids outside the columns; on a GPU,
    where looking would stall, such a label gives a NaN loss.

    >>> h_s, W_s = torch.zeros(1, 1), torch.ones(2, 1)
    >>> loss, kl, ce = linear_kl(h_s, W_s, torch.tensor([[0.0, -torch.inf]]), labels=torch.tensor([1]), ce_w=1.0)
    >>> round(loss.item(), 4), round(kl.item(), 4), round(ce.item(), 4)
    (1.3863, 0.6931, 0.6931)
    """
    given = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if torch.is_autocast_enabled(h_s.device.type):
        low = torch.get_autocast_dtype(h_s.device.type)
        h_s, W_s = h_s.to(low), W_s.to(low)
        if len(given) == 2:
            given = [value.to(low) for value in given]
    check.shapes(h_s=(h_s, "ND"), W_s=(W_s, "SD"), mask=(mask, "N"), labels=(labels, "N"))
    check.dtype("h_s", h_s, _FLOATS)
    check.same("dtype", h_s=h_s, W_s=W_s)
    check.dtype("mask", mask, (torch.bool, torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16))
    check.dtype("labels", labels, (torch.int64, torch.int32))
    check.same("device", h_s=h_s, W_s=W_s, mask=mask, labels=labels, **{f"teacher[{i}]": value for i, value in enumerate(given)})
    _check_teacher(h_s, given, tau)
    _check_settings(tau, direction, chunk, vocabulary)
    if not choice.library(binding.OP, h_s.device.type) or not choice.library("head/linear_cross_entropy", h_s.device.type):
        return reference.linear_kl(h_s, W_s, given, mask, labels, tau, direction, kl_w, ce_w, chunk, vocabulary=vocabulary)
    grad = torch.is_grad_enabled()
    loss, kl, ce, _, _ = binding.fused(
        h_s,
        W_s,
        [value.detach() for value in given],
        None if mask is None else mask.bool(),
        labels,
        reference.num_columns(W_s, given, vocabulary),
        float(tau),
        direction,
        float(kl_w),
        float(ce_w),
        chunk,
        grad and h_s.requires_grad,
        grad and W_s.requires_grad,
    )
    return loss, kl, ce


def _check_teacher(h_s: Tensor, given: list[Tensor], tau: float) -> None:
    if len(given) not in (1, 2, 3):
        check.fail("teacher", f"{len(given)} tensors", "is no teacher", "pass logits, (h_t, W_t), or (ids, logp, rest)")
    if reference.is_cache(given):
        ids, logp, rest = given
        check.shapes(h_s=(h_s, "ND"), ids=(ids, "NK"), logp=(logp, "NK"), rest=(rest, "N"))
        check.dtype("ids", ids, (torch.int64, torch.int32))
        check.dtype("logp", logp, (*_FLOATS, torch.float16))
        check.dtype("rest", rest, (*_FLOATS, torch.float16))
        if ids.shape[1] < 1:
            check.fail("ids", f"shape {tuple(ids.shape)}", "names no id", "cache at least one")
        if tau != 1:
            check.fail("tau", tau, "does not fit a cache, which holds probabilities at temperature 1", "use 1, or a live teacher")
    elif len(given) == 1:
        check.shapes(h_s=(h_s, "ND"), teacher=(given[0], "NT"))
        check.dtype("teacher", given[0], _FLOATS)
    else:
        check.shapes(h_s=(h_s, "ND"), h_t=(given[0], "NE"), W_t=(given[1], "TE"))
        check.dtype("h_t", given[0], _FLOATS)
        check.same("dtype", h_t=given[0], W_t=given[1])


def _check_settings(tau: float, direction: str, chunk: int, vocabulary: int | None) -> None:
    if not tau > 0:
        check.fail("tau", tau, "is not above 0", "use for example 1.0")
    if chunk < 1:
        check.fail("chunk", chunk, "is below 1", "use for example 256")
    if vocabulary is not None and vocabulary < 1:
        check.fail("vocabulary", vocabulary, "leaves no column", "give the number of columns to compare")
    check.one_of("direction", direction, binding.DIRECTIONS)
