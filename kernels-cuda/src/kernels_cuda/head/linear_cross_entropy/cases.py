"""Inputs that the op is tested with. N rows, D hidden width, V vocabulary."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(
    dtype: torch.dtype,
    rows: int,
    width: int,
    vocabulary: int,
    *,
    scale: float = 1.0,
    ignored: float = 0.2,
    weighted: bool = False,
    reduction: str = "sum",
) -> Arguments:
    """Random arguments whose logits have a standard deviation of about `scale`."""
    generator = torch.Generator().manual_seed(rows + width + vocabulary)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * scale / max(width, 1) ** 0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    weights = (
        torch.randn(rows, generator=generator, dtype=torch.float32).to(torch.promote_types(dtype, torch.float32)) if weighted else None
    )
    return {
        "hidden_ND": hidden.requires_grad_(),
        "weight_VD": weight.requires_grad_(),
        "labels_N": labels,
        "weights": None if weights is None else weights.requires_grad_(),
        "reduction": reduction,
    }


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 26, 48, 51)
    hidden = arguments["hidden_ND"].detach()[::2, ::3].requires_grad_()
    weight = arguments["weight_VD"].detach()[:, :16].t().contiguous().t().requires_grad_()
    return {**arguments, "hidden_ND": hidden, "weight_VD": weight, "labels_N": arguments["labels_N"][::2]}


def _one_gradient(dtype: torch.dtype, constant: str) -> Arguments:
    arguments = make(dtype, 9, 8, 20)
    return {**arguments, constant: arguments[constant].detach()}


def _short_labels(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 9, 8, 20)
    return {**arguments, "labels_N": arguments["labels_N"].int().where(arguments["labels_N"] >= 0, 3), "ignore_index": 3}


def _padded(dtype: torch.dtype, reduction: str = "sum") -> Arguments:
    """A weight with rows that take no part."""
    arguments = make(dtype, 30, 24, 101, weighted=True, reduction=reduction)
    weight = torch.cat([arguments["weight_VD"].detach(), torch.full((5, 24), 100.0).to(dtype)])
    return {**arguments, "weight_VD": weight.requires_grad_(), "vocabulary": 101}


CASES = [
    Case("ordinary", partial(make, rows=37, width=24, vocabulary=101)),
    Case("weighted", partial(make, rows=37, width=24, vocabulary=101, weighted=True)),
    Case("rows", partial(make, rows=37, width=24, vocabulary=101, reduction="none")),
    Case("weighted rows", partial(make, rows=12, width=10, vocabulary=31, weighted=True, reduction="none")),
    Case("odd sizes", partial(make, rows=7, width=5, vocabulary=33)),
    Case("one of each", partial(make, rows=1, width=1, vocabulary=1, ignored=0)),
    Case("no rows", partial(make, rows=0, width=4, vocabulary=9)),
    Case("all ignored", partial(make, rows=5, width=4, vocabulary=9, ignored=1)),
    Case("strided", _strided),
    Case("hidden only", partial(_one_gradient, constant="weight_VD")),
    Case("weight only", partial(_one_gradient, constant="hidden_ND")),
    Case("int32 labels, another ignored", _short_labels),
    Case("confident", partial(make, rows=30, width=24, vocabulary=101, scale=30)),
    Case("huge logits", partial(make, rows=30, width=24, vocabulary=101, scale=1e4)),
    Case("many chunks", partial(make, rows=700, width=16, vocabulary=17)),
    Case("padded vocabulary", _padded),
    Case("padded vocabulary, rows", partial(_padded, reduction="none")),
    Case("long rows", partial(make, rows=3, width=8, vocabulary=5003)),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 3, 7, ignored=0), **changes}


REFUSED = [
    Refused("three dimensions", lambda: _changed(hidden_ND=torch.ones(2, 2, 3)), "hidden: shape .* has 3 dimensions; pass 2: N, D"),
    Refused("other width", lambda: _changed(weight_VD=torch.ones(7, 4)), "weight: shape .* has D = 4 where hidden has 3"),
    Refused("other rows", lambda: _changed(labels_N=torch.zeros(5, dtype=torch.int64)), "labels: shape .* has N = 5 where hidden has 4"),
    Refused("half", lambda: _changed(hidden_ND=torch.ones(4, 3).half()), "hidden: torch.float16 is not supported; use float32 or bfloat16"),
    Refused("mixed", lambda: _changed(weight_VD=torch.ones(7, 3).bfloat16()), "weight: dtype torch.bfloat16 differs from hidden"),
    Refused("float labels", lambda: _changed(labels_N=torch.zeros(4)), "labels: torch.float32 is not supported; use int64 or int32"),
    Refused("mean", lambda: _changed(reduction="mean"), "reduction: 'mean' is not known; use 'sum' or 'none'"),
    Refused("large vocabulary", lambda: _changed(vocabulary=8), "vocabulary: 8 is not a number of rows of a weight that has 7; use 1 to 7"),
    Refused("padding as label", lambda: _changed(vocabulary=2), "labels: .* is outside the vocabulary of 2"),
    Refused("label too large", lambda: _changed(labels_N=torch.tensor([0, 1, 7, 2])), "labels: 7 in row 2 is outside the vocabulary of 7"),
    Refused("label negative", lambda: _changed(labels_N=torch.tensor([0, -1, 2, 2])), "labels: -1 in row 1 is outside"),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found: list[Call] = []
    for dtype, vocabulary in ((torch.float32, 37), (torch.bfloat16, 45), (torch.float64, 8)):
        arguments = make(dtype, 6, 5, vocabulary)
        logits = (arguments["hidden_ND"] @ arguments["weight_VD"].t()).detach()
        losses = torch.zeros(6, dtype=torch.promote_types(dtype, torch.float32))
        found += [
            Call("softmax_gradient_", (logits, arguments["labels_N"], torch.ones_like(losses), losses, -100, True)),
            Call("softmax_gradient_", (logits, arguments["labels_N"], None, losses, -100, False)),
        ]
    # 1003 elements: whole packs and a rest
    high, part = torch.randn(2, 1003).bfloat16().unbind()
    low = torch.randint(-(2**15), 2**15, (1003,), dtype=torch.int16)
    return [*found, Call("add_split_", (high, low, part)), Call("round_split_", (high, low))]


def calls() -> list[Call]:
    """Calls of the ops that binding.py builds from them."""
    found: list[Call] = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels, weights, _ = make(dtype, 6, 5, 37, weighted=True).values()
        found += [
            Call("linear_cross_entropy", (hidden, weight, labels, weights, -100, 37, True, True)),
            Call("linear_cross_entropy", (hidden.detach(), weight, labels, None, -100, 37, False, True)),
            Call("linear_cross_entropy_rows", (hidden, weight, labels, -100, 37)),
        ]
    return found
