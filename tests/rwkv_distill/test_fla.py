"""Recurrences by flash-linear-attention: what its kernels are given and give, in their conventions, is what our operators mean."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_distill import fla, reference
from tests.rwkv_distill.small import student, tokens

# B rows, T time, H heads, N head size
SHAPE = 2, 7, 3, 32


def sequences(cu_seqlens: Tensor | None, rows: int, time: int) -> list[tuple[int, int, int]]:
    """Row, first token and end of every sequence."""
    if cu_seqlens is None:
        return [(row, 0, time) for row in range(rows)]
    assert cu_seqlens.dtype == torch.int64
    edges = cu_seqlens.tolist()
    return [(0, first, end) for first, end in pairwise(edges)]


def written_out(r: Tensor, w: Tensor, others: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What the documents of flash-linear-attention say: w is the logarithm of the decay, states have rows for keys."""
    assert options.pop("scale") == 1.0
    state, keep, edges = options.pop("initial_state"), options.pop("output_final_state"), options.pop("cu_seqlens")
    assert not options
    k, v = others["k"], others["v"]
    out, finals = torch.zeros_like(v, dtype=torch.float64), []
    for number, (row, first, end) in enumerate(sequences(edges, *r.shape[:2])):
        s_HKV = torch.zeros(r.shape[2], r.shape[3], r.shape[3], dtype=torch.float64) if state is None else state[number].double()
        for t in range(first, end):
            decay, new = w[row, t].double().exp()[:, :, None], k[row, t].double()[:, :, None] * v[row, t].double()[:, None]
            if "u" in others:
                y = s_HKV + others["u"].double()[:, :, None] * new
                s_HKV = decay * s_HKV + new
            else:
                read = torch.einsum("hk,hkv->hv", others["a"][row, t].double(), s_HKV)
                s_HKV = y = decay * s_HKV + others["b"][row, t].double()[:, :, None] * read[:, None] + new
            out = out.index_put((torch.tensor(row), torch.tensor(t)), torch.einsum("hk,hkv->hv", r[row, t].double(), y))
        finals.append(s_HKV)
    return out.to(v.dtype), torch.stack(finals).float() if keep else None


def chunk_rwkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **options: Any) -> Any:
    return written_out(r, w, {"k": k, "v": v, "a": a, "b": b}, options)


def chunk_rwkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, **options: Any) -> Any:
    return written_out(r, w, {"k": k, "v": v, "u": u}, options)


@pytest.fixture(autouse=True)
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, function in (("rwkv7", chunk_rwkv7), ("rwkv6", chunk_rwkv6)):
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)


def inputs(version: str, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    torch.manual_seed(0)
    found = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(6 if version == "wkv7" else 4)]
    if version == "wkv6":
        return [*found, torch.randn(shape[2:], dtype=torch.bfloat16)]
    found[4] = -torch.nn.functional.normalize(found[4].float(), dim=-1).bfloat16()
    found[5] = -(found[4] * torch.sigmoid(found[5]))
    return found


@pytest.mark.parametrize("version", ["wkv7", "wkv6"])
@pytest.mark.parametrize("case", ["plain", "masked", "packed"])
def test_results_and_gradients_are_those_of_the_definition(version: str, case: str) -> None:
    given = [value.requires_grad_() for value in inputs(version, (1, 9, 3, 32) if case == "packed" else SHAPE)]
    options: dict[str, Any] = {"output_final_state": True}
    if case == "packed":
        options["cu_seqlens"] = torch.tensor([0, 4, 9], dtype=torch.int32)
    if case == "masked":
        options["mask"] = torch.tensor([[0, 1, 1, 1, 0, 1, 1], [1] * 7])
    state = torch.randn(2, 3, 32, 32, requires_grad=True)
    found = []
    for function, cast in ((getattr(fla, version), torch.bfloat16), (getattr(reference, version), torch.float64)):
        start = state.to(torch.float64 if cast == torch.float64 else torch.float32)
        y, final = function(*(value.to(cast) for value in given), initial_state=start, **options)
        gradients = torch.autograd.grad(y.double().square().sum() + final.double().square().sum(), [*given, state])
        found.append([y, final, *gradients])
    for mine, expected in zip(*found, strict=True):
        error = (mine.double() - expected.double()).norm() / expected.double().norm()
        assert error < 1e-2


def test_a_student_is_the_same_by_either(monkeypatch: pytest.MonkeyPatch) -> None:
    for fields, version in (({"preset": "rad"}, "rwkv7"), ({"rwkv_version": "v6"}, "rwkv6")):
        model, ids = student("qwen2", **fields).bfloat16(), tokens(2, 9)
        mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
        with torch.no_grad():
            ours, exact = model(ids, mask).logits, student("qwen2", **fields).bfloat16().float()(ids, mask).logits
            fla.use_fla(model)
            torch.testing.assert_close(model(ids, mask).logits[mask.bool()], ours[mask.bool()], rtol=0.05, atol=0.05)
            monkeypatch.delattr(sys.modules[f"fla.ops.{version}"], f"chunk_{version}")
            with pytest.raises(AttributeError):
                model(ids, mask)
            # what is read back and compared does not ask for them
            torch.testing.assert_close(model.float()(ids, mask).logits, exact)
