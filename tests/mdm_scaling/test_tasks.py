from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.mdm_scaling.small import Table, network

from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError
from mdm_scaling import losses
from mdm_scaling.model import Scorer
from mdm_scaling.noise import Noise
from mdm_scaling.options import TasksConfig
from mdm_scaling.tasks import causal_versions, grouped, masked_versions, read_items, run, scores

V, S = 3, 4
TABLE = Table(V, S, seed=2)


def nll(context: list[int], target: list[int], how: Any, num_mc: int = 64, chunk: int = 32, address: int = 0) -> float:
    made = masked_versions(context, target, how=how, mask_id=V, num_mc=num_mc, seed=1, address=address)
    return scores(TABLE, [made], chunk)[0]


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
    assert scores(Scorer(model), [causal_versions(context, target)], 1)[0] == pytest.approx(
        -float(logprobs[2, 4] + logprobs[3, 5]), rel=1e-5
    )


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
    options: dict[str, Any] = {"checkpoint": str(tmp_path / "model"), "tasks": str(tmp_path / "items.jsonl")}
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


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_what_is_scored_together_changes_nothing(objective: Any) -> None:
    """Targets of unequal lengths, padded and in any groups, have the values that they have alone."""
    scorer = Scorer(network(objective)).eval()
    pairs = [([1, 2, 3], [4, 5]), ([7], [8]), ([9, 10, 11, 12], [13, 14, 15])]
    if objective == "ar":
        made = [causal_versions(*pair) for pair in pairs]
    else:
        made = [masked_versions(*pair, how="mc", mask_id=50, num_mc=5, seed=1, address=at) for at, pair in enumerate(pairs)]
    alone = [scores(scorer, [each], 1)[0] for each in made]
    for chunk in (4, 100):
        torch.testing.assert_close(torch.tensor(scores(scorer, made, chunk)), torch.tensor(alone), rtol=2e-5, atol=1e-5)


def test_groups_fill_a_forward_pass() -> None:
    made = [masked_versions([1], [2], how="mc", mask_id=9, num_mc=3, seed=1, address=at) for at in range(5)]
    assert [len(group) for group in grouped(made, "auto", 6)] == [2, 2, 1]
    assert [len(group) for group in grouped(made, "4", 6)] == [4, 1]
    with pytest.raises(ConfigError, match="batch_size: '0' is no number of targets"):
        TasksConfig(checkpoint="x", tasks="x", batch_size="0")


def test_names_are_asked_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    network("mdm", vocabulary=259).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    options: dict[str, Any] = {"checkpoint": str(tmp_path), "tasks": "arc_easy,piqa", "num_mc": 2, "limit": 3}
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="tasks: there is no file arc_easy,piqa, and lm_eval"):
        run(TasksConfig(**options))
    asked: dict[str, Any] = {}

    def simple_evaluate(**given: Any) -> Any:
        asked.update(given)
        request = SimpleNamespace(args=("ab", "c"))
        return {"results": {"piqa": {"acc,none": -given["model"].loglikelihood([request])[0][0]}}}

    for name, module in {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.api": SimpleNamespace(),
        "lm_eval.api.model": SimpleNamespace(LM=object),
        "lm_eval.api.registry": SimpleNamespace(register_model=lambda name: lambda made: made),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mdm_scaling.harness", raising=False)
    found = run(TasksConfig(**options))
    assert (asked["tasks"], asked["limit"]) == (["arc_easy", "piqa"], 3)
    assert found["results"]["piqa"]["acc,none"] > 0
    assert "piqa  acc,none" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="method: tasks of lm-eval say themselves"):
        run(TasksConfig(**options, method="mc"))


@pytest.mark.parametrize(
    ("text", "message"), [("", "no item"), ("{}", ":1 lacks"), ('{"context": "a", "choices": ["b"], "answer": 1}', "none of 1 choices")]
)
def test_odd_items_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_items(tmp_path / "items.jsonl")
