from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lm_core.config import build, to_dict
from lm_core.method import Method
from lm_core.options import RunConfig
from lm_core.run import run
from lm_core.testing import Conformance, spawn
from lowrank_opt.config import OPTIMIZERS, TrainConfig
from lowrank_opt.method import LowRank


class LowRankConformance(Conformance):
    optimizer = "baseline"

    def configure(self, **options: Any) -> RunConfig:
        values: dict[str, Any] = {
            "mode": "pretraining",
            "optimizer": self.optimizer,
            "model": "llama_test",
            "tokenizer": "bytes",
            "data": ["synthetic:markov"],
            "max_length": 64,
            "packing": "stream",
            "lr": 5e-3,
            "schedule": "cosine",
            **options,
        }
        return build(TrainConfig, values)

    def method(self, config: RunConfig) -> Method:
        assert isinstance(config, TrainConfig)
        return LowRank(config)


@pytest.mark.slow
class TestBaseline(LowRankConformance):
    optimizer = "baseline"


@pytest.mark.slow
class TestLora(LowRankConformance):
    optimizer = "lora"

    def configure(self, **options: Any) -> RunConfig:
        # dropout draws by place in the micro-batch, so with it a step depends on how a batch is split
        return super().configure(lora={"lora_dropout": 0.0}, **options)


@pytest.mark.slow
class TestGalore(LowRankConformance):
    optimizer = "galore"

    def configure(self, **options: Any) -> RunConfig:
        return super().configure(galore={"rank": 8, "update_proj_gap": 3}, **options)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", typing.get_args(OPTIMIZERS))
def test_every_optimizer_trains_and_resumes_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    suite = LowRankConformance()
    suite.optimizer = optimizer
    suite.test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["eval/markov/loss"] for record in records if "eval/markov/loss" in record]
    assert held_out[-1] < held_out[0]


def test_lora_pretraining_exports_a_merged_model_and_trains_embeddings(tmp_path: Path) -> None:
    suite = TestLora()
    suite.run(tmp_path, budget="2 steps")
    assert not (tmp_path / "final" / "adapter_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").config.model_type == "llama"
    method = suite.method(suite.options())
    trained = {name for name, parameter in method.build().named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained} >= {"embed_tokens", "lm_head", "norm", "default"}


def test_galore_projects_the_body_and_leaves_embeddings_head_and_norms_dense() -> None:
    suite = TestGalore()
    _, engine, _ = suite.assemble(suite.options())
    groups = {bool(group["rank"]): group["names"] for group in engine.optimizer.param_groups}
    assert len(groups[True]) == 14
    assert all("proj" in name for name in groups[True])


@pytest.mark.real
@pytest.mark.slow
def test_galore_lowers_the_held_out_loss_of_a_real_model_and_resumes(tmp_path: Path) -> None:
    values = {
        "mode": "finetuning",
        "optimizer": "galore",
        "model": "smollm2-135m",
        "data": ["builtin:python-docs"],
        "packing": "stream",
        "precision": "bf16",
        "max_length": 256,
        "micro_batch_size": 2,
        "lr": 1e-4,
        "schedule": "constant",
        "galore": {"rank": 16, "update_proj_gap": 3},
        "eval_tokens": 1024,
        "eval_every": "0.5",
        "save_every": "3",
        "tensorboard": False,
        "output_dir": tmp_path,
    }
    config = build(TrainConfig, {**values, "max_steps": 3})
    run(config, LowRank(config))
    config = build(TrainConfig, {**values, "max_steps": 6, "resume": "auto"})
    result = run(config, LowRank(config))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["eval/python-docs/loss"] for record in records if "eval/python-docs/loss" in record]
    assert result["progress"]["steps"] == 6
    assert held_out[-1] < held_out[0]
    memory = result["memory"]
    assert memory["predicted_peak_bytes"] == pytest.approx(memory["measured_peak_bytes"], rel=0.15)


def test_a_dry_run_of_a_model_that_does_not_fit_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_core.unbuilt.available_bytes", lambda device: 2**30)
    config = LowRankConformance().options(tmp_path / "run", model="llama_1b", max_length=512, micro_batch_size=32, dry_run=True)
    counts = run(config, LowRank(build(TrainConfig, to_dict(config))))
    assert counts["parameters"]["total"] == 1_339_082_752
    assert counts["memory"]["optimizer"] == 8 * 1_339_082_752
    assert not (tmp_path / "run").exists()


def _half_precision(folder: Path) -> float:
    config = LowRankConformance().options(folder, optimizer="baseline", galore={}, engine="sharded", precision="fp16", budget="4 steps")
    return float(run(config, LowRank(config))["eval"]["eval/markov/loss"])


@pytest.mark.slow
def test_float16_trains_in_the_sharded_engine(tmp_path: Path) -> None:
    assert 0 < spawn(_half_precision, tmp_path, world=1)[0] < 6
