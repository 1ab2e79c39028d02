"""Inputs that the op is tested with. N rows, D and E hidden widths of student and teacher, S and T rows of their heads."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch

from kernels_cuda.testing import Arguments, Call, Case, Refused


def make(
    dtype: torch.dtype,
    rows: int,
    width: int = 8,
    vocabulary: int = 40,
    *,
    teacher: Literal["logits", "head", "cache"] = "logits",
    teacher_vocabulary: int | None = None,
    teacher_dtype: torch.dtype | None = None,
    ids: int = 5,
    scale: float = 1.0,
    masked: float = 0.0,
    ignored: float | None = None,
    **settings: Any,
) -> Arguments:
    """Random arguments whose logits have a standard deviation of about `scale`."""
    generator = torch.Generator().manual_seed(rows + width + vocabulary)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    columns = teacher_vocabulary or vocabulary
    of_teacher = teacher_dtype or dtype
    h_s, W_s = random(rows, width), random(vocabulary, width) * scale / max(width, 1) ** 0.5
    given: Any = (random(rows, columns) * scale).to(of_teacher)
    if teacher == "head":
        given = random(rows, 6).to(of_teacher), (random(columns, 6) * scale / 6**0.5).to(of_teacher)
    if teacher == "cache":
        given = cache(given.float(), ids, of_teacher)
    labels = None
    if ignored is not None:
        labels = torch.randint(0, min(vocabulary, columns), (rows,), generator=generator)
        labels[torch.rand(rows, generator=generator) < ignored] = -100
    return {
        "h_s": h_s.to(dtype).requires_grad_(),
        "W_s": W_s.to(dtype).requires_grad_(),
        "teacher": given,
        "mask": torch.rand(rows, generator=generator) >= masked if masked else None,
        "labels": labels,
        **settings,
    }


def cache(logits: torch.Tensor, ids: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The teacher's best ids of each row."""
    log_p = logits.double().log_softmax(-1)
    logp, best = log_p.topk(ids, dim=-1)
    rest = log_p.scatter(1, best, -torch.inf).logsumexp(-1)
    return best.int(), logp.to(dtype), rest.to(dtype)


def _strided(dtype: torch.dtype) -> Arguments:
    arguments = make(dtype, 18, ignored=0.3)
    wide = make(dtype, 36, 24)
    return {
        **arguments,
        "h_s": wide["h_s"].detach()[::2, ::3].requires_grad_(),
        "W_s": arguments["W_s"].detach().t().contiguous().t().requires_grad_(),
        "teacher": arguments["teacher"].t().contiguous().t(),
    }


def _one_gradient(dtype: torch.dtype, constant: str) -> Arguments:
    arguments = make(dtype, 9, ignored=0.3)
    return {**arguments, constant: arguments[constant].detach()}


def _impossible(dtype: torch.dtype) -> Arguments:
    """Half of the columns have probability zero for the teacher."""
    arguments = make(dtype, 9)
    arguments["teacher"][:, ::2] = -torch.inf
    return arguments


_everything: dict[str, Any] = {"masked": 0.3, "ignored": 0.3, "kl_w": 0.7, "ce_w": 0.4}
_narrow = (torch.bfloat16,)
_full = (torch.float32,)

CASES = [
    Case("ordinary", partial(make, rows=21, vocabulary=101, ignored=0.3, ce_w=0.5)),
    Case("head", partial(make, rows=21, vocabulary=101, teacher="head", chunk=8, **_everything)),
    Case("cache", partial(make, rows=21, vocabulary=101, teacher="cache", chunk=8, **_everything)),
    Case("cache of all columns", partial(make, rows=7, vocabulary=16, teacher="cache", ids=16, **_everything)),
    Case("cache without labels", partial(make, rows=7, teacher="cache", direction="reverse")),
    Case("cache in half", partial(make, rows=7, teacher="cache", teacher_dtype=torch.float16)),
    Case("reverse", partial(make, rows=21, direction="reverse", **_everything)),
    Case("adaptive", partial(make, rows=21, direction="adaptive", **_everything), differentiable=False),
    Case("adaptive cache", partial(make, rows=21, teacher="cache", direction="adaptive", **_everything), differentiable=False),
    Case("soft", partial(make, rows=9, tau=2.5, **_everything)),
    Case("sharp and reverse", partial(make, rows=9, tau=0.5, direction="reverse", **_everything)),
    Case("larger teacher", partial(make, rows=9, teacher="head", teacher_vocabulary=47, **_everything)),
    Case("smaller teacher", partial(make, rows=9, teacher_vocabulary=33, **_everything)),
    Case("fewer columns still", partial(make, rows=9, teacher="cache", teacher_vocabulary=33, vocabulary=40, **_everything)),
    Case("only cross entropy", partial(make, rows=9, ignored=0.2, kl_w=0.0, ce_w=1.0)),
    Case("nothing counts", partial(make, rows=5, masked=1.1, ignored=1.1, ce_w=1.0)),
    Case("no rows", partial(make, rows=0, ignored=0.0)),
    Case("one of each", partial(make, rows=1, width=1, vocabulary=1, ignored=0.0, ce_w=1.0)),
    Case("strided", _strided),
    Case("hidden only", partial(_one_gradient, constant="W_s")),
    Case("weight only", partial(_one_gradient, constant="h_s")),
    Case("impossible columns", _impossible),
    Case("confident", partial(make, rows=9, scale=30.0, **_everything)),
    Case("far apart and reverse", partial(make, rows=9, scale=30.0, direction="reverse", **_everything)),
    Case("float32 teacher", partial(make, rows=9, teacher_dtype=torch.float32, **_everything), _narrow),
    Case("bfloat16 teacher", partial(make, rows=9, teacher="head", teacher_dtype=torch.bfloat16, **_everything), _full),
    Case("long rows", partial(make, rows=3, vocabulary=5003, direction="adaptive", **_everything), differentiable=False),
]


def _changed(**changes: Any) -> Arguments:
    return {**make(torch.float32, 4, 3, 7, ignored=0.0), **changes}


def _cached(**changes: Any) -> Arguments:
    arguments = make(torch.float32, 4, 3, 7, teacher="cache", ids=2)
    ids, logp, rest = arguments["teacher"]
    return {**arguments, "teacher": (changes.pop("ids", ids), changes.pop("logp", logp), rest), **changes}


REFUSED = [
    Refused("three dimensions", lambda: _changed(h_s=torch.ones(2, 2, 3)), "h_s: shape .* has 3 dimensions; pass 2: N, D"),
    Refused("other width", lambda: _changed(W_s=torch.ones(7, 4)), "W_s: shape .* has D = 4 where h_s has 3"),
    Refused("other rows", lambda: _changed(teacher=torch.ones(5, 7)), "teacher: shape .* has N = 5 where h_s has 4"),
    Refused("other head", lambda: _changed(teacher=(torch.ones(4, 2), torch.ones(7, 3))), "W_t: shape .* has E = 3 where h_t has 2"),
    Refused("four tensors", lambda: _changed(teacher=(torch.ones(4, 2),) * 4), "teacher: 4 tensors is no teacher; pass logits"),
    Refused("half", lambda: _changed(h_s=torch.ones(4, 3).half()), "h_s: torch.float16 is not supported; use float32 or bfloat16"),
    Refused("mixed", lambda: _changed(W_s=torch.ones(7, 3).bfloat16()), "W_s: dtype torch.bfloat16 differs from h_s"),
    Refused("integer teacher", lambda: _changed(teacher=torch.ones(4, 7).int()), "teacher: torch.int32 is not supported; use float32"),
    Refused("float mask", lambda: _changed(mask=torch.ones(4)), "mask: torch.float32 is not supported; use bool or int64"),
    Refused("float labels", lambda: _changed(labels=torch.zeros(4)), "labels: torch.float32 is not supported; use int64 or int32"),
    Refused("float ids", lambda: _cached(ids=torch.ones(4, 2)), "ids: torch.float32 is not supported; use int64 or int32"),
    Refused("other ids", lambda: _cached(logp=torch.ones(4, 3)), "logp: shape .* has K = 3 where ids has 2"),
    Refused("no ids", lambda: _cached(ids=torch.ones(4, 0).int(), logp=torch.ones(4, 0)), "ids: shape .* names no id; cache at least one"),
    Refused("id too large", lambda: _cached(ids=torch.tensor([[0, 7]] * 4)), "teacher ids: 7 is outside the 7 columns"),
    Refused("warm cache", lambda: _cached(tau=2.0), "tau: 2.0 does not fit a cache"),
    Refused("cold", lambda: _changed(tau=0.0), "tau: 0.0 is not above 0"),
    Refused("sideways", lambda: _changed(direction="sideways"), "direction: 'sideways' is not known; use 'forward' or 'reverse'"),
    Refused("no chunk", lambda: _changed(chunk=0), "chunk: 0 is below 1"),
    Refused("no columns", lambda: _changed(vocabulary=0), "vocabulary: 0 leaves no column"),
    Refused("label too large", lambda: _changed(labels=torch.tensor([0, 1, 7, 2])), "labels: 7 in row 2 is outside the vocabulary of 7"),
    Refused(
        "label above the columns", lambda: _changed(vocabulary=5, labels=torch.tensor([0, 5, 1, 2])), "labels: 5 in row 1 .* use 0 to 4"
    ),
]


def kernel_calls() -> list[Call]:
    """Calls of the compiled functions."""
    found: list[Call] = []
    for dtype, vocabulary in ((torch.float32, 37), (torch.bfloat16, 45), (torch.float64, 8)):
        arguments = make(dtype, 6, 5, vocabulary, masked=0.3, ignored=0.3)
        logits = (arguments["h_s"] @ arguments["W_s"].t()).detach()
        kl = torch.zeros(6, dtype=torch.promote_types(dtype, torch.float32))
        scales, teacher = torch.tensor([0.5, 0.2]).to(kl), arguments["teacher"]
        found += [
            Call("kl_gradient_", (logits, teacher, arguments["mask"], arguments["labels"], scales, kl, kl.clone(), 2.0, 0, True)),
            Call("kl_gradient_", (logits, teacher, None, None, scales, kl, kl.clone(), 1.0, 2, True)),
            Call("kl_gradient_", (logits, teacher, None, arguments["labels"], scales, kl, kl.clone(), 1.0, 1, False)),
            Call("log_sums_", (logits, kl)),
            Call("scale_softmax_", (logits, logits.to(kl).logsumexp(1), torch.ones_like(kl))),
        ]
    return found


def calls() -> list[Call]:
    """Calls of the ops that binding.py builds from them."""
    found: list[Call] = []
    for kind, dtype in (("logits", torch.float32), ("head", torch.bfloat16), ("cache", torch.float32)):
        arguments = make(dtype, 6, 5, 37, teacher=kind, masked=0.3, ignored=0.3)  # type: ignore[arg-type]
        h_s, W_s, teacher, mask, labels = arguments.values()
        given = [teacher] if kind == "logits" else list(teacher)
        settings = 37, 1.0, "forward", 0.5, 0.2, 4
        found += [
            Call("linear_kl", (h_s, W_s, given, mask, labels, *settings, True, True)),
            Call("linear_kl", (h_s.detach(), W_s, given, None, None, *settings, False, True)),
        ]
    return found
