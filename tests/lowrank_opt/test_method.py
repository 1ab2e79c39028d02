from __future__ import annotations

import json
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm_core.config import build, to_dict
from lm_core.errors import ConfigError, InputError, ResumeRefused
from lm_core.method import Method
from lm_core.models import load_model
from lm_core.options import RunConfig
from lm_core.run import run
from lm_core.testing import ENGINES, Conformance, spawn
from lowrank_opt import csv_sink
from lowrank_opt.config import TrainConfig
from lowrank_opt.estimation import side_by_side
from lowrank_opt.method import LowRank
from lowrank_opt.models import PRESETS
from lowrank_opt.optimizer_options import OPTIMIZERS


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
    refuses = dict.fromkeys(
        (name for name in ENGINES if name != "sharded"),
        "flattens matrices, which galore needs as they are; use --engine sharded, or --engine lowrank with --shard-optimizer true",
    )

    def configure(self, **options: Any) -> RunConfig:
        # the side that sharded matrices are projected on
        return super().configure(**{"galore": {"rank": 8, "update_proj_gap": 3, "proj_type": "right"}, **options})


def test_a_resumed_run_may_begin_with_a_fresh_and_other_optimizer(tmp_path: Path) -> None:
    suite = TestGalore()
    suite.run(tmp_path / "run", budget="2 steps")
    longer: dict[str, Any] = {"resume": "auto", "budget": "4 steps", "optimizer": "apollo", "galore": {}, "apollo": {"apollo_rank": 4}}

    def go_on(**more: Any) -> None:
        config = LowRankConformance().options(tmp_path / "run", **{**longer, **more})
        run(config, LowRank(config))

    with pytest.raises(ResumeRefused, match="the checkpoint was written with 'galore', this run asks for 'apollo'"):
        go_on()
    with pytest.raises(ResumeRefused, match="max_length: the checkpoint"):
        go_on(resume_reset_optimizer=True, max_length=32)
    go_on(resume_reset_optimizer=True)
    info = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "optimizer.json").read_text())
    assert info["class"].endswith("ApolloAdamW")
    assert {state["step"] for state in info["state"].values()} == {2}
    progress = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "state.json").read_text())["progress"]
    assert progress["steps"] == 4


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


def test_weights_for_a_named_size_come_from_a_folder_of_that_size(tmp_path: Path) -> None:
    suite = LowRankConformance()
    load_model("llama_test", presets=PRESETS, seed=3).save_pretrained(tmp_path / "trained")
    config = suite.options(model_path=tmp_path / "trained", mode="finetuning")
    built = suite.method(config).build().state_dict()
    assert torch.equal(built["model.lm_head.weight"], load_model("llama_test", presets=PRESETS, seed=3).lm_head.weight)
    with pytest.raises(ConfigError, match="has hidden_size 64, llama_60m has 512"):
        suite.method(suite.options(model="llama_60m", model_path=tmp_path / "trained", mode="finetuning")).build()


def test_models_that_bring_no_tokenizer_have_a_default_one() -> None:
    config = build(TrainConfig, {"mode": "pretraining", "optimizer": "galore", "model": "llama_test", "data": ["synthetic:markov"]})
    assert len(LowRank(config).tokenizer()) == 259
    with pytest.raises(InputError, match=r"t5-base.*bytes"):
        LowRank(build(TrainConfig, {**to_dict(config), "model": "llama_60m"})).tokenizer()


def test_adapter_targets_that_the_model_lacks_are_named_with_those_it_has() -> None:
    suite = LowRankConformance()
    suite.optimizer = "lora"
    config = suite.options(lora={"target_modules_by_model": {"llama_test": ["q_proj", "query"]}})
    with pytest.raises(ConfigError, match="is called query; choose from q_proj, k_proj, v_proj, o_proj, gate_proj"):
        suite.method(config).build()


@pytest.mark.parametrize("bias", ["none", "all"])
def test_biases_are_trained_beside_adapters_where_asked(bias: str) -> None:
    suite = LowRankConformance()
    suite.optimizer = "lora"
    config = suite.options(mode="finetuning", model="gpt2_test", lora={"bias": bias})
    trained = {name for name, parameter in suite.method(config).build().named_parameters() if parameter.requires_grad}
    assert any(name.endswith("bias") for name in trained) == (bias == "all")


def rows(folder: Path) -> list[dict[str, str]]:
    return csv_sink.read(folder / "output.csv")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "grad_clip": 0.5}], ids=["one backward", "accumulated and clipped"])
def test_per_layer_updates_resume_bit_for_bit_and_their_table_goes_on(tmp_path: Path, options: dict[str, Any]) -> None:
    suite = TestGalore()
    options = {**options, "per_layer": True, "log_every": 1, "save_every": "3"}
    suite.run(tmp_path / "whole", budget="6 steps", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints/checkpoint-6")
    suite.run(tmp_path / "part", budget="6 steps", resume="auto", **options)
    first, second = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    measured = {"compute_time", "tokens_per_second", *(name for name in csv_sink.COLUMNS if name.startswith("peak_"))}
    tables = [[{name: row[name] for name in row if name not in measured} for row in rows(tmp_path / name)] for name in ("whole", "part")]
    assert tables[0] == tables[1]
    assert [row["training_step"] for row in tables[1]] == ["1", "2", "3", "4", "5", "6"]
    assert {row["grad_norm_kind"] for row in tables[0]} == {"projected" if "accumulate" in options else "full"}
    assert int(tables[0][-1]["refreshes"]) > int(tables[0][0]["refreshes"]) == 14


@pytest.mark.slow
def test_per_layer_updates_are_the_ordinary_ones(tmp_path: Path) -> None:
    suite = TestGalore()
    for name, per_layer in (("plain", False), ("layers", True)):
        suite.run(tmp_path / name, budget="5 steps", per_layer=per_layer)
    first, second = (load_file(tmp_path / name / "final/model.safetensors") for name in ("plain", "layers"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_before_the_first_step_the_kinds_of_parameters_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    suite = TestGalore()
    with caplog.at_level("INFO", "lowrank_opt"):
        _, engine, _ = suite.assemble(suite.options())
    # 2 layers of 4 x 64 x 64 and 3 x 64 x 172; embedding and head of 512 x 64, and 5 norms
    assert "low-rank 98,816 (14 matrices)  dense 65,856  frozen 0" in caplog.text
    assert f"state {engine.optimizer.predicted_state_bytes():,} bytes" in caplog.text


REAL: dict[str, dict[str, Any]] = {
    "galore": {"lr": 1e-4, "galore": {"rank": 16, "update_proj_gap": 6}},
    "galore8bit": {"lr": 1e-4, "galore": {"rank": 16, "update_proj_gap": 6, "proj_method": "rsvd"}},
    "lora+galore8bit": {"lr": 3e-3, "galore": {"rank": 16, "update_proj_gap": 6}, "lora": {"r": 32, "lora_alpha": 32, "lora_dropout": 0.0}},
}


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", REAL)
def test_the_held_out_loss_of_a_real_model_falls_and_a_run_resumes(optimizer: str, tmp_path: Path) -> None:
    values = {
        "mode": "finetuning",
        "optimizer": optimizer,
        "model": "smollm2-135m",
        "data": ["builtin:python-docs"],
        "packing": "stream",
        "precision": "bf16",
        "max_length": 128,
        "micro_batch_size": 2,
        "schedule": "constant",
        "eval_tokens": 512,
        "eval_every": "0.5",
        "save_every": "2",
        "tensorboard": False,
        "output_dir": tmp_path,
        **REAL[optimizer],
    }
    config = build(TrainConfig, {**values, "max_steps": 2})
    run(config, LowRank(config))
    config = build(TrainConfig, {**values, "max_steps": 4, "resume": "auto"})
    method = LowRank(config)
    result = run(config, method)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["eval/python-docs/loss"] for record in records if "eval/python-docs/loss" in record]
    assert result["progress"]["steps"] == 4
    assert held_out[-1] < held_out[0]
    saved = load_file(tmp_path / "checkpoints" / "checkpoint-4" / "optimizer.safetensors")
    assert sum(tensor.nbytes for tensor in saved.values()) == method.built.state_bytes() == side_by_side(config)[optimizer].states
    if not optimizer.startswith("lora"):
        # there, the second copy of the weights that compares the written folder is more than the step needs
        assert result["memory"]["predicted_peak_bytes"] == pytest.approx(result["memory"]["measured_peak_bytes"], rel=0.15)


def test_a_dry_run_of_a_model_that_does_not_fit_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_core.unbuilt.available_bytes", lambda device: 2**30)
    config = LowRankConformance().options(tmp_path / "run", model="llama_1b", max_length=512, micro_batch_size=32, dry_run=True)
    counts = run(config, LowRank(build(TrainConfig, to_dict(config))))
    assert counts["parameters"]["total"] == 1_339_082_752
    assert counts["memory"]["optimizer"] == 8 * 1_339_082_752
    assert counts["memory"]["gradients"] == 4 * 1_339_082_752
    layers = build(TrainConfig, {**to_dict(config), "per_layer": True})
    # the largest one, embedding or head
    assert run(layers, LowRank(layers))["memory"]["gradients"] == 4 * 32000 * 2048
    assert not (tmp_path / "run").exists()


def _half_precision(folder: Path) -> float:
    config = LowRankConformance().options(folder, optimizer="baseline", galore={}, engine="sharded", precision="fp16", budget="4 steps")
    return float(run(config, LowRank(config))["eval"]["eval/markov/loss"])


@pytest.mark.slow
def test_float16_trains_in_the_sharded_engine(tmp_path: Path) -> None:
    assert 0 < spawn(_half_precision, tmp_path, world=1)[0] < 6
