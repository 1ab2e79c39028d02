"""Scores by gradients, the splits made from them, and the co-activation graph: against naive writings of the same rules."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lm_core.errors import ConfigError, InputError
from moe_cpt.convert import convert
from moe_cpt.export import export
from moe_cpt.inspection import load_mixture
from moe_cpt.options.conversion import ExportConfig
from moe_cpt.plan import parameter_counts
from moe_cpt.split import Split, described, split_ffn
from moe_cpt.split.gradient import assigned, best
from moe_cpt.split.graph import coactivation, cut, partition
from moe_cpt.split.importance import sample_gradients, score, write_scores
from moe_cpt.split.residual import common
from tests.moe_cpt.small import dense_folder, dense_model, tokens


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def change_of_loss(kind: str, projection: str, ids: torch.Tensor) -> torch.Tensor:
    """Derivative of the mean cross entropy by one number per neuron of layer 1, added to its hidden values or to 1 as their factor."""
    dense: Any = dense_model().double()
    mlp, at = dense.model.layers[1].mlp, torch.zeros(64, dtype=torch.float64, requires_grad=True)

    def changed(h: torch.Tensor) -> torch.Tensor:
        return h + at if kind == "feature_grad" else h * (1 + at)

    if projection == "gate_proj":
        mlp.gate_proj.register_forward_hook(lambda module, inputs, output: changed(output))
    else:
        mlp.down_proj.register_forward_pre_hook(lambda module, inputs: (changed(inputs[0]),))
    loss = torch.nn.functional.cross_entropy(dense(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return torch.autograd.grad(loss, at)[0]


@pytest.mark.parametrize("kind", ["feature_grad", "feature_change"])
@pytest.mark.parametrize("projection", ["up_proj", "gate_proj"])
def test_gradients_are_the_change_of_a_samples_loss(kind: str, projection: str) -> None:
    ids = tokens(2, 9)
    found = sample_gradients(dense_model().double(), ids, kind)[f"layers.1.{projection}"]  # type: ignore[arg-type]
    for row in range(2):
        assert_close(found[row], change_of_loss(kind, projection, ids[row : row + 1]), rtol=1e-4, atol=1e-8)


def test_sizes_are_taken_per_sample_or_of_their_mean() -> None:
    dense, ids = dense_model().double(), tokens(4, 9)
    each = sample_gradients(dense, ids, "feature_change")["layers.0.up_proj"]
    clusters = [[ids[:1], ids[1:3]], [ids[3:]]]
    sizes: dict[Any, Callable[[Any], Any]] = {"plain": lambda g: g, "l1_norm": abs, "l2_norm": lambda g: g * g}
    for kernel, size in sizes.items():
        by_sample = score(dense, clusters, kernel=kernel, level="sample", kind="feature_change")["layers.0.up_proj"]
        of_mean = score(dense, clusters, kernel=kernel, level="total", kind="feature_change")["layers.0.up_proj"]
        assert_close(by_sample, torch.stack([size(each[:3]).mean(0), size(each[3])]).float())
        assert_close(of_mean, torch.stack([size(each[:3].mean(0)), size(each[3])]).float())
    assert all(parameter.requires_grad for parameter in dense.parameters())


def naively_assigned(score_NM: np.ndarray[Any, Any], size: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in score_NM]
    while any(len(expert) < size for expert in found):
        taken = {neuron for expert in found for neuron in expert}
        pairs = [(-score_NM[e, n], e, n) for e, n in product(*map(range, score_NM.shape)) if len(found[e]) < size and n not in taken]
        _, expert, neuron = min(pairs)
        found[expert].append(neuron)
    return [sorted(expert) for expert in found]


@pytest.mark.parametrize("seed", range(3))
def test_the_best_remaining_pair_is_given_away_first(seed: int) -> None:
    # few values, so that there are ties
    scores = (3 * draw(3, 12, seed=seed)).round()
    assert assigned(scores, 4).tolist() == naively_assigned(scores.numpy(), 4)
    assert assigned(scores, 3).tolist() == naively_assigned(scores.numpy(), 3)
    assert assigned(scores, 4, "min").tolist() == naively_assigned(-scores.numpy(), 4)


def test_shared_neurons_are_each_experts_best() -> None:
    scores = torch.tensor([[5.0, 1, 5, 0, 2], [1, 9, 1, 1, 1]])
    assert best(scores, 2).tolist() == [[0, 2], [0, 1]]
    assert best(scores, 2, "min").tolist() == [[1, 3], [0, 2]]


def test_common_neurons_are_those_that_most_experts_rank_high() -> None:
    scores = torch.zeros(3, 8)
    scores[0, [1, 4]], scores[1, [4, 6]], scores[2, [4, 1]] = 1.0, 1.0, 1.0
    # neuron 4 three times, 1 twice, 6 once
    assert common(scores, 1, 2, "max").tolist() == [4]
    assert common(scores, 3, 2, "max").tolist() == [1, 4, 6]
    # nobody ranked a fourth one: ranks among 0, 2, 3, 5, 7 are all ties
    assert common(scores, 5, 2, "max").tolist() == [0, 1, 2, 4, 6]


def scored(tmp_path: Path, clusters: int, seed: int = 0) -> Path:
    names = [f"layers.{layer}.{projection}" for layer in range(2) for projection in ("up_proj", "gate_proj")]
    write_scores(tmp_path / "score.safetensors", {name: draw(clusters, 64, seed=seed + at).float() for at, name in enumerate(names)})
    return tmp_path / "score.safetensors"


def test_a_residual_split_is_a_partition_with_shared_experts(tmp_path: Path) -> None:
    made = split_ffn(dense_model().state_dict(), "residual", num_experts=6, num_experts_residual=2, score_file_path=scored(tmp_path, 6))
    assert made.partition
    assert (made.num_experts, made.num_shared_experts, made.indices[0].shape) == (6, 2, (6, 8))
    made.save(tmp_path / "split")
    assert Split.load(tmp_path / "split").partition


def test_scores_of_another_number_of_clusters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 6 clusters of 64 neurons for 8 experts"):
        split_ffn(dense_model().state_dict(), "gradient", num_experts=8, score_file_path=scored(tmp_path, 6))
    with pytest.raises(ConfigError, match="expert_size: 6 experts of 11 of 64 neurons; use at most 10"):
        split_ffn(dense_model().state_dict(), "gradient", num_experts=6, expert_size=11, score_file_path=scored(tmp_path, 6))


@pytest.mark.parametrize("options", [{"share_neurons": True, "expert_size": 20}, {"expert_size": 9}], ids=["shared", "smaller"])
def test_experts_that_share_or_lack_neurons_compute_what_they_hold(options: dict[str, Any], tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    split = split_ffn(source, "gradient", num_experts=6, score_file_path=scored(tmp_path, 6), **options)
    split.save(tmp_path / "split")
    split = Split.load(tmp_path / "split")
    assert not split.partition
    made = convert(source, split, tmp_path / "moe", num_selects=6, score_scale_factor=6.0, gate_network="linear", gate_init="zeros")
    model = load_mixture(str(tmp_path / "moe")).double()
    assert parameter_counts(made.to_dict()).total == sum(tensor.numel() for name, tensor in model.state_dict().items()) - sum(
        tensor.numel() * (made.stored_size - made.expert_size) // made.stored_size
        for name, tensor in model.state_dict().items()
        if ".experts." in name
    )
    x = draw(1, 5, 32)
    for layer, (block, old) in enumerate(zip(model.blocks(), dense_model().double().model.layers)):
        times = torch.bincount(torch.cat(split.layer(layer)[0]), minlength=64)
        hidden = torch.nn.functional.silu(old.mlp.gate_proj(x)) * old.mlp.up_proj(x) * times
        assert_close(block(x)[0], old.mlp.down_proj(hidden), rtol=0, atol=1e-12)
    assert "neurons in one expert" in described(split, 0)
    with pytest.raises(InputError, match="share neurons or lack some, so there is no dense model to go back to"):
        export(ExportConfig(model=str(tmp_path / "moe"), format="llama", save_path=tmp_path / "out"))


def test_uneven_experts_are_the_dense_model_together_and_count_their_own_neurons(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    even = split_ffn(source, "random", num_experts=4, seed=3)
    sizes = [3, 30, 1, 30]
    indices = []
    for layer in even.indices:
        parts = layer.flatten().split(sizes)
        indices.append(torch.stack([torch.nn.functional.pad(part, (0, 30 - len(part)), value=-1) for part in parts]))
    split = Split("by hand", indices, 64, even.model_hash, 3)
    split.save(tmp_path / "split")
    split = Split.load(tmp_path / "split")
    made = convert(source, split, tmp_path / "moe", num_selects=4, score_scale_factor=4.0, gate_network="linear", gate_init="zeros")
    assert (made.size_experts, made.stored_size) == ([sizes, sizes], 32)
    assert_close(load_mixture(str(tmp_path / "moe"))(tokens()).logits, dense_model()(tokens()).logits, rtol=1e-4, atol=1e-4)
    counts = parameter_counts(made.to_dict())
    assert counts.total == counts.active == counts.dense + 2 * 2 * 4 * 32
    with pytest.raises(ConfigError, match="its experts differ in size"):
        export(ExportConfig(model=str(tmp_path / "moe"), format="mixtral", save_path=tmp_path / "out"))
    assert export(ExportConfig(model=str(tmp_path / "moe"), format="llama", save_path=tmp_path / "out"))["difference"] < 1e-4


def test_coactivation_is_capped_per_batch() -> None:
    a = draw(7, 5)
    for metric, size in (("plain", lambda v: v), ("l1_norm", abs), ("l2_norm", lambda v: v * v)):
        expected = np.zeros((5, 5))
        for first in (0, 3, 6):
            part = size(a.numpy()[first : first + 3])
            for i, j in product(range(5), range(5)):
                expected[i, j] += 0 if i == j else min(float(part[:, i] @ part[:, j]), 0.8)
        assert_close(coactivation(a, metric, 0.8, 3).double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_planted_parts_are_found_and_no_exchange_improves_a_partition() -> None:
    order = np.random.default_rng(0).permutation(24)
    planted = np.repeat(np.arange(4), 6)[order]
    weights = (planted[:, None] == planted[None]).astype(np.float32) + 0.1
    np.fill_diagonal(weights, 0)
    labels = partition(weights, 4, seed=1)
    assert len({tuple(pair) for pair in zip(planted, labels)}) == 4
    noisy = draw(20, 20, seed=4).abs().float().numpy()
    noisy += noisy.T
    np.fill_diagonal(noisy, 0)
    labels = partition(noisy, 4, seed=1)
    assert np.bincount(labels).tolist() == [5] * 4
    for one, other in combinations(range(20), 2):
        changed = labels.copy()
        changed[[one, other]] = changed[[other, one]]
        assert cut(noisy, changed) >= cut(noisy, labels) - 1e-6


def test_neurons_that_are_all_alike_still_give_equal_parts() -> None:
    labels = partition(np.ones((12, 12), dtype=np.float32) - np.eye(12, dtype=np.float32), 4, seed=1)
    assert np.bincount(labels).tolist() == [3] * 4
    assert sorted(assigned(torch.zeros(3, 12), 4).flatten().tolist()) == list(range(12))
