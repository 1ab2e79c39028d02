"""What every method must hold, for stage 1; and a few steps on a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_core.config import build
from lm_core.method import Method
from lm_core.options import RunConfig
from lm_core.run import run
from lm_core.testing import Conformance
from rwkv_distill.align import Align
from rwkv_distill.config import TrainConfig
from rwkv_distill.distill import Distill
from rwkv_distill.generate import generate
from rwkv_distill.student import load_student

TINY: dict[str, Any] = {
    "model": "tiny", "tokenizer": "bytes", "data": ["synthetic:markov"], "max_length": 48, "accumulate": 1, "warmup": 2,
    "lr": 3e-3, "lr_final": 1e-3, "stop_loss": 0,
}  # fmt: skip


class AlignConformance(Conformance):
    preset = "arwkv"

    def configure(self, **options: Any) -> TrainConfig:
        return build(TrainConfig, {**TINY, "student": {"preset": self.preset, "head_size": 32}, **options})

    def method(self, config: RunConfig) -> Method:
        assert isinstance(config, TrainConfig)
        return Align(config)


@pytest.mark.slow
class TestArwkv(AlignConformance):
    preset = "arwkv"


class Rad(AlignConformance):
    __test__ = False
    preset = "rad"

    def configure(self, **options: Any) -> TrainConfig:
        return super().configure(packing="document", layer_local=False, **options)


class Version6(AlignConformance):
    __test__ = False

    def configure(self, **options: Any) -> TrainConfig:
        return build(TrainConfig, {**TINY, "student": {"rwkv_version": "v6", "head_size": 32}, **options})


@pytest.mark.parametrize("suite", [Rad, Version6])
def test_every_tensor_of_other_students_learns_however_a_batch_is_split(suite: type[AlignConformance]) -> None:
    # engines and resumed runs see no difference between students
    suite().test_every_trained_tensor_gets_a_gradient()
    suite().test_loss_does_not_depend_on_how_a_batch_is_split()


def test_only_mixers_are_trained_and_the_teachers_attention_is_in_no_file(tmp_path: Path) -> None:
    suite = AlignConformance()
    method, engine, _ = suite.assemble(suite.options())
    assert {name for name, p in engine.model.named_parameters() if p.requires_grad} == {
        name for name, _ in engine.model.named_parameters() if "time_mixer" in name
    }
    groups = {group["lr_scale"]: group["names"] for group in engine.optimizer.param_groups}
    assert all(name.endswith("w0") for name in groups[2.0])
    suite.run(tmp_path, budget="2 steps")
    names = set(load_file(tmp_path / "final/model.safetensors"))
    assert not [name for name in names if "q_proj" in name]
    assert isinstance(method, Align)


def test_calibration_starts_the_run_at_a_smaller_error(tmp_path: Path) -> None:
    suite = AlignConformance()
    first = {}
    for calibrate in (True, False):
        suite.run(tmp_path / str(calibrate), budget="1 steps", calibrate=calibrate, align_loss="mse")
        lines = (tmp_path / str(calibrate) / "metrics.jsonl").read_text().splitlines()
        first[calibrate] = next(record["eval/markov/loss"] for record in map(json.loads, lines) if "eval/markov/loss" in record)
    assert first[True] < 0.9 * first[False]


@pytest.mark.real
@pytest.mark.slow
def test_both_stages_bring_a_real_student_nearer_to_its_teacher(tmp_path: Path) -> None:
    held_out = {}
    for stage, method in ((1, Align), (2, Distill)):
        values = {
            "model": "smollm2-135m", "data": ["builtin:python-docs"], "max_length": 64, "accumulate": 1, "warmup": 1, "budget": "4 steps",
            "lr": 3e-4, "eval_every": "0.99", "eval_tokens": 128, "tensorboard": False, "device": "cpu", "stage": stage,
            "save_only_model": True, "gradient_checkpointing": False, "output_dir": tmp_path / str(stage),
            **({} if stage == 1 else {"ckpt_file": tmp_path / "1/final/pytorch_model.bin"}),
        }  # fmt: skip
        config = build(TrainConfig, values)
        run(config, method(config))
        records = [json.loads(line) for line in (tmp_path / str(stage) / "metrics.jsonl").read_text().splitlines()]
        held_out[stage] = [record["eval/python-docs/loss"] for record in records if "eval/python-docs/loss" in record]
    assert held_out[1][-1] < 0.97 * held_out[1][0], held_out
    assert held_out[2][-1] < 0.95 * held_out[2][0], held_out
    student = load_student(tmp_path / "2/final").eval()
    assert generate(student, torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape == (1, 4)
