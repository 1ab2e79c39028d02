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
from lm_core.estimate import parameters
from lm_core.method import Batch
from lm_core.run import run
from lm_core.testing import spawn
from mdm_scaling.config import PretrainConfig, settled
from mdm_scaling.method import Pretrain

BASE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_channels": 8,
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
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "eval_every": "2",
    "eval_iters": 2,
    "log_every": 1,
    "tensorboard": False,
    "save_every": "2",
    "keep_best": False,
    "budget": "4 steps",
}
# an embedding of its own for the head of one objective, and the same one for both ends of the other
OBJECTIVES: dict[str, dict[str, Any]] = {"ar": {"objective": "ar", "untie_embeddings": True}, "mdm": {"objective": "mdm"}}
TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
# no part that is LLaMA's alone
VARIANT = {"objective": "mdm", "normalization": "layernorm", "swiglu": False, "use_rotary_position_embeddings": False}
DROPOUT = {"attention_dropout": 0.3, "hidden_dropout": 0.3}


def options(**changes: Any) -> PretrainConfig:
    return settled(build(PretrainConfig, {**BASE, **changes}))


def train(folder: Path, **changes: Any) -> None:
    config = options(output_dir=folder, **changes)
    run(config, Pretrain(config))


def first_batch() -> Batch:
    tokens = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
    return Batch({"input_ids": tokens, "labels": tokens}, index=torch.arange(2), step=0)


def engine_of(**changes: Any) -> tuple[Any, Pretrain]:
    config = options(**changes)
    device = dist.init("cpu")
    method = Pretrain(config)
    method.vocabulary = 259
    torch.manual_seed(0)
    return cast(Any, make_engine(config, method, method.build(), device)), method


def gradients(**changes: Any) -> dict[str, Tensor]:
    """Of one micro-batch, whole, by name, as far as this process has them; the norm that clipping sees; and the model's size."""
    engine, method = engine_of(**changes)
    engine.start(1e-3)
    engine.accumulate(method, [first_batch()], 64)
    found = {
        name: (parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad).clone()
        for name, parameter in engine.model.named_parameters()
    }
    total = (engine.counts or parameters(engine.model)).total
    return {**found, "norm": torch.tensor(engine.step()), "total": torch.tensor(total)}


def losses_twice(**changes: Any) -> tuple[float, float]:
    """The loss of one batch, as this process knows it, and that of a second call at the same address."""
    engine, method = engine_of(**changes)
    losses = []
    for _ in range(2):
        engine.start(0.0)
        losses.append(float(engine.accumulate(method, [first_batch()], 64).loss))
        engine.drop()
    return losses[0], losses[1]


def halved(whole: Path, half: Path) -> None:
    """A copy of a run as it was at step 2 of 4."""
    shutil.copytree(whole, half)
    shutil.rmtree(half / "final")
    shutil.rmtree(half / "checkpoints" / "checkpoint-4")


def on_two(folder: Path) -> dict[str, Any]:
    """What one launch of two processes shows."""
    found = {}
    for name, objective in OBJECTIVES.items():
        for layout, changes in (("tensor", TENSOR), ("pipeline", PIPELINE)):
            train(folder / name / layout, **objective, **changes)
            both = {**objective, **changes}
            found[name, layout] = gradients(**both), losses_twice(**both, **DROPOUT), losses_twice(**both, precision="bf16")
    train(folder / "ar" / "one_then_pipeline", **OBJECTIVES["ar"], **PIPELINE, resume="auto")
    train(folder / "mdm" / "one_then_tensor", **OBJECTIVES["mdm"], **TENSOR, resume="auto")
    dropping = {**OBJECTIVES["mdm"], **PIPELINE, **DROPOUT}
    train(folder / "mdm" / "whole", **dropping)
    dist.on_main(halved, folder / "mdm" / "whole", folder / "mdm" / "resumed")
    train(folder / "mdm" / "resumed", **dropping, resume="auto")
    return found


def on_four(folder: Path) -> None:
    train(folder / "ar" / "pipeline_data", **OBJECTIVES["ar"], **PIPELINE)
    train(folder / "mdm" / "tensor_data", **OBJECTIVES["mdm"], **TENSOR)
    train(folder / "mdm" / "pipeline_tensor", **OBJECTIVES["mdm"], **PIPELINE, **TENSOR, gradient_checkpointing=True)
    train(folder / "variant" / "pipeline_tensor", **VARIANT, **PIPELINE, **TENSOR)


def curve(folder: Path, key: str) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [value for record in records for name, value in record.items() if name == key]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, one folder per objective, and copies of them that ended half-way."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, objective in OBJECTIVES.items():
        train(folder / name / "one", **objective)
        halved(folder / name / "one", folder / name / ("one_then_pipeline" if name == "ar" else "one_then_tensor"))
    return folder


def assert_the_same_run(folder: Path, one: Path) -> None:
    for name in ("train/loss", "optim/grad_norm", "eval/markov/loss"):
        assert curve(one, name)
        assert curve(folder, name) == pytest.approx(curve(one, name), rel=1e-5)
    # the same masks, not similar ones
    assert curve(folder, "train/mask_ratio") == curve(one, "train/mask_ratio")
    found, expected = weights(folder), weights(one)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # an update by Adam divides by what may be next to nothing
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_two_processes_that_share_a_model_equal_one(runs: Path) -> None:
    results = spawn(on_two, runs)
    for name, objective in OBJECTIVES.items():
        one, expected = runs / name / "one", gradients(**objective)
        for layout in ("tensor", "pipeline"):
            assert_the_same_run(runs / name / layout, one)
            both = [found[name, layout][0] for found in results]
            # each process of a pipeline has some of the gradients
            assert {key for found in both for key in found} == expected.keys()
            for found in both:
                for key, gradient in found.items():
                    # the two parts of a tied embedding are added in the update, where the norm sees their sum
                    if (name, layout) == ("mdm", "pipeline") and "embed_tokens" in key:
                        continue
                    torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)
            # dropout: an address gives the same draws, and all processes learn one loss
            (_, first, halves), (_, second, _) = (found[name, layout] for found in results)
            assert first == second
            assert first[0] == first[1]
            assert halves == pytest.approx(losses_twice(**objective, precision="bf16"), rel=1e-2)
    assert_the_same_run(runs / "ar" / "one_then_pipeline", runs / "ar" / "one")
    assert_the_same_run(runs / "mdm" / "one_then_tensor", runs / "mdm" / "one")

    # on at another layout: one process after two
    for name, layout in (("ar", "tensor"), ("mdm", "pipeline")):
        folder = runs / name / f"{layout}_then_one"
        halved(runs / name / layout, folder)
        train(folder, **OBJECTIVES[name], resume="auto")
        assert_the_same_run(folder, runs / name / "one")

    # on at the same layout, dropout included
    whole, resumed = runs / "mdm" / "whole", runs / "mdm" / "resumed"
    assert curve(resumed, "train/loss") == curve(whole, "train/loss")
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name


@pytest.mark.slow
def test_four_processes_in_two_dimensions_equal_one(runs: Path) -> None:
    train(runs / "variant" / "one", **VARIANT)
    spawn(on_four, runs, world=4)
    for name in ("ar/pipeline_data", "mdm/tensor_data", "mdm/pipeline_tensor", "variant/pipeline_tensor"):
        assert_the_same_run(runs / name, runs / name.partition("/")[0] / "one")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**TENSOR, "engine": "sharded"}, "tensor_model_parallel_size: 2 goes with the replicated engine alone"),
        ({**PIPELINE, "zero_stage": 3}, "pipeline_model_parallel_size: 2 goes with the replicated engine alone"),
        ({**TENSOR, "num_processes": 3}, "tensor_model_parallel_size: 2 processes share a model, which does not divide the 3 processes"),
        (
            {**TENSOR, **PIPELINE, "num_processes": 6},
            "tensor_model_parallel_size: 4 processes share a model, which does not divide the 6 processes",
        ),
        ({"pipeline_model_parallel_size": 4, "num_processes": 4}, "pipeline_model_parallel_size: 4 stages, but 3 layers"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=message):
        settled(build(PretrainConfig, {**BASE, "objective": "ar", **changes}))
