"""Clusters of texts, scores, splits and trained routers, from the command line to a mixture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from moe_cpt.inspection import load_mixture
from moe_cpt.split.text_clusters import WordEncoder, assigned, kmeans
from moe_cpt.train_gate import expert_scores, fit, logits, overlap
from tests.moe_cpt.small import dense_folder
from tests.moe_cpt.test_commands import call

TOPICS = ("red green blue paint colour", "sum product root square number", "north south river mountain map")


def texts(path: Path, count: int = 30) -> Path:
    """Documents of three topics in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": n, "text": " ".join(TOPICS[n % 3].split()[: 2 + n % 4]) + f" word{n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_words_are_weighted_by_frequency_and_rarity() -> None:
    encoder = WordEncoder.fitted(["a a b", "b c"])
    assert encoder.words == ["b", "a", "c"]
    rare = math.log(3 / 2) + 1
    expected = torch.tensor([[1.0, 2 * rare, 0.0], [1.0, 0.0, rare]], dtype=torch.float64)
    assert_close(encoder(["a a b", "b c"]).to_dense(), torch.nn.functional.normalize(expected, dim=1))
    assert not encoder(["unknown"]).to_dense().any()


def test_no_cluster_is_empty_even_among_equal_rows() -> None:
    rows = torch.nn.functional.normalize(torch.ones(6, 3, dtype=torch.float64), dim=1)
    assert sorted(assigned(rows, kmeans(rows, 4, seed=0)).unique().tolist()) == [0, 1, 2, 3]


def test_every_text_is_in_the_cluster_of_its_topic_once(tmp_path: Path) -> None:
    words = ("cluster-text", "-d", texts(tmp_path / "x.jsonl"), "-n", 3, "-m", tmp_path / "model")
    counts = call(*words, "-o", tmp_path / "out")["texts"]
    assert counts == [10, 10, 10]
    ids = [[json.loads(line)["id"] for line in (tmp_path / "out" / f"{cluster}.jsonl").read_text().splitlines()] for cluster in range(3)]
    assert sorted(number for cluster in ids for number in cluster) == list(range(30))
    assert [len({number % 3 for number in cluster}) for cluster in ids] == [1, 1, 1]
    # centres found once sort further texts
    again = call(*words, "--no-do_train", "-o", tmp_path / "again")
    assert again["texts"] == counts
    assert "model_dir: " in call(*words, "-o", tmp_path / "third", code=2)


def test_router_is_fitted_to_the_most_active_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 16, generator=generator)
    truth = torch.randn(6, 16, generator=generator)
    z = expert_scores(x @ truth.repeat_interleave(2, 0).T, list(torch.arange(12).view(6, 2)), "plain")
    assert_close(z.mean(1), torch.zeros(600), rtol=0, atol=1e-5)
    assert_close(z.std(1, correction=0), torch.ones(600))
    for network in ("linear", "mlp"):
        weights = fit(x[:500], z[:500], network, epochs=60, lr=0.1, batch_size=100, seed=3)  # type: ignore[arg-type]
        found = overlap(logits(weights, x[500:]), z[500:], 2)
        assert found > 0.85, network
    assert overlap(z, z, 3) == 1.0
    assert overlap(-z, z, 3) == 0.0


@pytest.mark.parametrize("criterion", ["plain", "positive", "l1_norm", "l2_norm"])
def test_expert_scores_are_those_of_their_names(criterion: str) -> None:
    h = torch.tensor([[1.0, -3.0, 2.0, 2.0]])
    raw = {"plain": [-2.0, 4.0], "positive": [1.0, 4.0], "l1_norm": [4.0, 4.0], "l2_norm": [10**0.5, 8**0.5]}[criterion]
    expected = [0.0, 0.0] if raw[0] == raw[1] else [-1.0, 1.0] if raw[0] < raw[1] else [1.0, -1.0]
    assert_close(expert_scores(h, [torch.tensor([0, 1]), torch.tensor([2, 3])], criterion)[0], torch.tensor(expected))  # type: ignore[arg-type]


@pytest.mark.slow
def test_from_texts_to_a_mixture_with_a_trained_router(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    model = ("--model_path", source)
    call("cluster-text", "-d", texts(tmp_path / "x.jsonl"), "-n", 4, "-m", tmp_path / "m", "-o", tmp_path / "clusters")
    words = ("score", "--model", source, "--dataset", tmp_path / "clusters", "--block_size", 16, "--batch_size", 2)
    found = call(*words, "--max_tokens", 40, "-o", tmp_path / "score")
    assert found["clusters"] == 4
    assert max(found["samples"]) == 3
    for method, more in (("gradient", ()), ("residual", ("--num_experts_residual", 4))):
        call("split", method, *model, "--score_file_path", tmp_path / "score", "--num_experts", 4, *more, "-o", tmp_path / method)
    text = ("--data", tmp_path / "x.jsonl", "--max_tokens", 400, "--block_size", 16)
    call("features", *model, *text, "--what", "up", "--what", "inputs", "--what", "act", "-o", tmp_path / "feats")
    made = call("split", "graph", *model, "--hidden_features_path", tmp_path / "feats", "--num_experts", 4, "-o", tmp_path / "graph")
    assert all(cost > 0 for cost in made["cost"])
    words = ("train-gate", *model, "--split_file_path", tmp_path / "gradient", "--hidden_features_path", tmp_path / "feats")
    gate = call(*words, "--num_selects", 2, "--epochs", 5, "-o", tmp_path / "gate")
    assert len(gate["overlap"]) == 2
    words = ("convert", *model, "--split_file_path", tmp_path / "gradient", "--num_selects", 2, "-o", tmp_path / "moe")
    call(*words, "--gate_init", "trained", "--select_file_path", tmp_path / "gate")
    assert load_mixture(str(tmp_path / "moe")).blocks()[0].router.fc1.weight.any()
    message = call(
        *words, "--overwrite", "--gate_network", "linear", "--gate_init", "trained", "--select_file_path", tmp_path / "gate", code=2
    )
    assert "holds mlp routers, not linear" in message
