"""Processes that share one model compute what one process computes: losses, gradients, checkpoints at any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lm_core import dist
from lm_core.config import build
from lm_core.engine import make_engine
from lm_core.errors import ConfigError
from lm_core.method import Batch
from lm_core.run import run
from lm_core.testing import spawn
from mdm_scaling.config import PretrainConfig, settled
from mdm_scaling.method import Pretrain

BASE: dict[str, Any] = {
    "model": "tiny",
    "tokenizer": "bytes",
    "data": ["synthetic:markov"],
    "max_length": 32,
    "lr": 5e-3,
    "warmup": 0.1,
    "num_workers": 0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "precision": "fp32",
    "device": "cpu",
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "eval_every": "2",
    "eval_iters": 2,
    "log_every": 1,
    "tensorboard": False,
    "save_every": "2",
    "keep_best": False,
    "budget": "4 steps",
}


def options(world: int = 1, **changes: Any) -> PretrainConfig:
    made = build(PretrainConfig, {**BASE, **changes})
    return build(PretrainConfig, {**BASE, **changes, "accumulate": 4 // 2 // max(1, world // made.tensor_model_parallel_size)})


def train(world: int, folder: Path, changes: dict[str, Any]) -> None:
    config = options(world, output_dir=folder, **changes)
    run(config, Pretrain(config))


def gradients(world: int, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Of the first micro-batch with dropout off, whole, by name; and the norm that clipping sees."""
    config = options(world, **changes)
    device = dist.init("cpu")
    method = Pretrain(config)
    method.vocabulary = 259
    torch.manual_seed(0)
    engine = cast(Any, make_engine(config, method, method.build(), device))
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
    batch = Batch({"input_ids": tokens, "labels": tokens}, index=torch.arange(2), step=0)
    engine.start(1e-3)
    engine.accumulate(method, [batch], 64)
    found = {
        name: (parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad).clone()
        for name, parameter in engine.model.named_parameters()
    }
    return {**found, "norm": torch.tensor(engine.step())}


def dropped(changes: dict[str, Any]) -> tuple[float, float]:
    """The loss with dropout, of this rank; and that of a second call at the same address."""
    config = options(2, **changes)
    device = dist.init("cpu")
    method = Pretrain(config)
    method.vocabulary = 259
    torch.manual_seed(0)
    engine = make_engine(config, method, method.build(), device)
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
    batch = Batch({"input_ids": tokens, "labels": tokens}, index=torch.arange(2), step=0)
    losses = []
    for _ in range(2):
        engine.start(0.0)
        losses.append(float(engine.accumulate(method, [batch], 64).loss))
        engine.drop()
    return losses[0], losses[1]


def several(objective: str, folder: Path) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """What one launch of two processes shows."""
    two = {"objective": objective, "tensor_model_parallel_size": 2}
    train(2, folder / "tensor", two)
    train(2, folder / "one_then_tensor", {**two, "resume": "auto"})
    dropping = {**two, "attention_dropout": 0.3, "hidden_dropout": 0.3}
    return gradients(2, two), dropped(dropping)


def halved(whole: Path, half: Path) -> None:
    """A copy of a run as it was at step 2 of 4."""
    shutil.copytree(whole, half)
    shutil.rmtree(half / "final")
    shutil.rmtree(half / "checkpoints" / "checkpoint-4")


def curve(folder: Path, key: str) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [value for record in records for name, value in record.items() if name == key]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_two_processes_that_share_a_model_equal_one(objective: str, tmp_path: Path) -> None:
    plain = {"objective": objective}
    train(1, tmp_path / "one", plain)
    halved(tmp_path / "one", tmp_path / "one_then_tensor")
    expected = gradients(1, plain)
    results = spawn(several, objective, tmp_path)

    for name in ("train/loss", "optim/grad_norm", "eval/markov/loss"):
        assert curve(tmp_path / "one", name)
        assert curve(tmp_path / "tensor", name) == pytest.approx(curve(tmp_path / "one", name), rel=1e-5)
    for found, _ in results:
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)

    # on at another layout: one process after two, and two after one
    halved(tmp_path / "tensor", tmp_path / "tensor_then_one")
    train(1, tmp_path / "tensor_then_one", {**plain, "resume": "auto"})
    whole = load_file(tmp_path / "one" / "final" / "model.safetensors")
    for folder in ("tensor_then_one", "one_then_tensor"):
        assert curve(tmp_path / folder, "train/loss") == pytest.approx(curve(tmp_path / "one", "train/loss"), rel=1e-5)
        weights = load_file(tmp_path / folder / "final" / "model.safetensors")
        for name, tensor in whole.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-5)

    # dropout: the ranks agree on everything outside attention, or their losses would differ
    (_, first), (_, second) = results
    assert first == second
    assert first[0] == first[1]


@pytest.mark.slow
def test_four_processes_in_two_groups_equal_one(tmp_path: Path) -> None:
    train(1, tmp_path / "one", {"objective": "mdm"})
    spawn(train, 4, tmp_path / "four", {"objective": "mdm", "tensor_model_parallel_size": 2}, world=4)
    assert curve(tmp_path / "four", "train/loss") == pytest.approx(curve(tmp_path / "one", "train/loss"), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "sharded"}, "goes with the replicated engine alone"),
        ({"zero_stage": 3}, "goes with the replicated engine alone"),
        ({"num_processes": 3}, "2 does not divide the 3 processes"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=message):
        settled(build(PretrainConfig, {**BASE, "objective": "ar", "tensor_model_parallel_size": 2, **changes}))
