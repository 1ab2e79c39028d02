"""What `moe-cpt bench` measures."""

from __future__ import annotations

import pytest
import torch

from moe_cpt import bench
from moe_cpt.options.checks import BenchConfig


def test_the_layers_that_are_compared_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOKENS": 40, "HIDDEN": 64, "EXPERTS": 4, "SELECTS": 2, "SIZE": 16}.items():
        monkeypatch.setattr(bench, name, value)
    found = bench.blocks(torch.float32)
    bench.require_equal(found, bench.numbers(1, 40, 64))
    assert bench.saved(found["fused"]) < bench.saved(found["loop"])


def test_a_ridge_router_is_the_best_for_every_split_and_beats_chance_by_the_target_for_activity() -> None:
    errors = {(figure.details["split"], figure.details["router"]): figure.value for figure in bench.construction(BenchConfig())}
    assert errors.pop(("activation over random", "ridge over random")) <= 0.65
    for split in ("random", "clustering", "activation"):
        assert errors[split, "ridge"] < min(errors[split, "random"], errors[split, "centroid"])
    assert min(errors, key=lambda at: errors[at]) == ("activation", "ridge")


def test_updates_are_measured_beside_every_other_backend_and_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MIXTURE", {**bench.MIXTURE, "hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2})
    monkeypatch.setattr(bench, "ROWS", (1, 8))
    figures = list(bench.train(BenchConfig(repeats=3)))
    assert [figure.details["baseline"] for figure in figures] == ["grouped_mm", "loop", "dense"]
    assert all(figure.value > 0 for figure in figures)


@pytest.mark.bench
def test_targets_of_the_layer_in_float32() -> None:
    """With 15 parts in a hundred more than the specification asks for."""
    figures = [figure for figure in bench.layer(BenchConfig()) if figure.details.get("dtype") == "float32"]
    judged = [(figure, figure.target) for figure in figures if figure.target is not None]
    assert len(judged) == 3
    for figure, target in judged:
        assert figure.value <= 1.15 * target, figure.what
