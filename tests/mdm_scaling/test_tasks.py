from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.mdm_scaling.small import Table, network

from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError
from mdm_scaling import losses
from mdm_scaling.config import TasksConfig
from mdm_scaling.model import Scorer
from mdm_scaling.noise import Noise
from mdm_scaling.tasks import causal_nll, read_items, run, target_nll

V, S = 3, 4
TABLE = Table(V, S, seed=2)


def nll(context: list[int], target: list[int], how: Any, num_mc: int = 64, chunk: int = 32, address: int = 0) -> float:
    return target_nll(TABLE, context, target, how=how, mask_id=V, num_mc=num_mc, seed=1, address=address, chunk=chunk)


def test_chain_is_a_distribution_over_targets() -> None:
    total = sum(math.exp(-nll([2], list(target), "chain")) for target in itertools.product(range(V), repeat=S - 1))
    assert total == pytest.approx(1.0, rel=1e-12)


def test_chain_of_a_whole_sequence_is_that_of_a_corpus() -> None:
    ids = torch.tensor([[0, 2, 1, 1]])
    expected = losses.bounds(TABLE, ids, "chain", num_mc=1, seed=0, noise=Noise(), mask_id=V)
    assert nll([], ids[0].tolist(), "chain") == pytest.approx(float(expected[0]), rel=1e-12)


def test_draws_estimate_the_exact_bound_of_the_target_alone() -> None:
    context, target = [2], [0, 1, 1]
    exact = 0.0
    for size in range(1, 4):
        for hidden in itertools.combinations(range(1, 4), size):
            noisy = torch.tensor([[*context, *target]])
            noisy[0, list(hidden)] = V
            ce = -TABLE.logits(noisy)[0].log_softmax(-1)
            beta = math.factorial(size - 1) * math.factorial(3 - size) / math.factorial(3)
            exact += beta * sum(float(ce[at, [*context, *target][at]]) for at in hidden)
    draws = torch.tensor([nll(context, target, "mc", address=address) for address in range(60)])
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / math.sqrt(60)


@pytest.mark.parametrize("how", ["mc", "chain"])
def test_chunks_change_nothing(how: str) -> None:
    assert nll([2], [0, 1, 1], how, chunk=1) == pytest.approx(nll([2], [0, 1, 1], how, chunk=100), rel=1e-12)


def test_causal_likelihood_is_that_of_the_model() -> None:
    model = network("ar")
    context, target = [1, 2, 3], [4, 5]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([[*context, *target]])).logits[0, :, :50].double().log_softmax(-1)
    assert causal_nll(Scorer(model), context, target) == pytest.approx(-float(logprobs[2, 4] + logprobs[3, 5]), rel=1e-5)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_file_of_items_is_scored(objective: Any, tmp_path: Path) -> None:
    network(objective, vocabulary=259).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    lines = [
        {"context": "ab", "choices": ["c", "dd"], "answer": 0},
        {"context": "", "choices": ["x", "y", "z"], "answer": 2},
        {"context": "q", "target": "r"},
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options: dict[str, Any] = {"checkpoint": str(tmp_path / "model"), "tasks": tmp_path / "items.jsonl"}
    result = run(TasksConfig(**options, num_mc=4))
    assert (result["items"], result["bound"], result["method"]) == (3, objective == "mdm", "mc" if objective == "mdm" else "chain")
    assert 0 <= result["accuracy"] <= 1
    assert result["nll"] > 0
    assert "exact_match" in run(TasksConfig(**options, method="greedy"))
    assert "exact_match" in run(TasksConfig(**options, only_generate=True))
    if objective == "ar":
        with pytest.raises(InputError, match="mc is the bound of masked models"):
            run(TasksConfig(**options, method="mc"))
    else:
        alone = run(TasksConfig(**options, only_mc_nll=True, num_mc=4))
        assert alone["nll"] == result["nll"]
        assert "accuracy" not in alone
    with pytest.raises(ConfigError, match="only_mc_nll: means --method mc, but chain is given"):
        TasksConfig(**options, only_mc_nll=True, method="chain")


@pytest.mark.parametrize(
    ("text", "message"), [("", "no item"), ("{}", ":1 lacks"), ('{"context": "a", "choices": ["b"], "answer": 1}', "none of 1 choices")]
)
def test_odd_items_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_items(tmp_path / "items.jsonl")
