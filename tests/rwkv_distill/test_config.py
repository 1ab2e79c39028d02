"""Flags of the guide, the learning rate, and refusals before any training."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from lm_core.config import build
from lm_core.errors import ConfigError
from rwkv_distill.cli import cli
from rwkv_distill.config import TrainConfig, processes, rate, require_fla, settle
from rwkv_distill.student_config import PRESETS

VALUES: dict[str, Any] = {"model": "tiny", "data": ["synthetic:markov"]}


def invoke(line: str) -> Result:
    return CliRunner().invoke(cli, shlex.split(f"train --model tiny --print-config {line}"))


def test_flags_of_the_guide_parse() -> None:
    line = "-F 0 -W torch -l 0.0001 -f 0.00001 -m 2048 -b 2 -r data -o out -g 1 -d 1 -t 1000_000_000 -T 0.2 -R v7 -s 1 -M 1 -n 1 -G 1 -a 4 -w 50 -S 3 -e 0 -N 0 -X 2 -P p"
    result = invoke(line)
    assert result.exit_code == 0, result.output
    found = yaml.safe_load(result.stdout)
    assert (found["lr"], found["lr_final"], found["max_length"], found["micro_batch_size"]) == (1e-4, 1e-5, 2048, 2)
    assert (found["data"], found["output_dir"], found["gradient_checkpointing"], found["deepspeed_offload"]) == (
        ["data"],
        "out",
        True,
        True,
    )
    assert (found["max_trained_tokens"], found["stop_loss"], found["stage"], found["student"]["group_norm"]) == (10**9, 0.2, 1, True)
    assert (found["full_params"], found["wkv"]) == (False, "torch")
    assert (found["zero_stage"], found["gate_free"], found["max_epochs"], found["wandb_project"]) == (3, False, 2, "p")


@pytest.mark.parametrize("word", ["0", "false", "off"])
def test_zero_is_off(word: str) -> None:
    assert yaml.safe_load(invoke(f"-g {word} -M {word}").stdout)["gradient_checkpointing"] is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-N 1 --batching pack", "need_to_pad: -N 1 means --batching concat, not pack"),
        ("--packing stream --batching pad", "batching: pad is not --packing stream"),
        ("-e 1 --gate sigmoid", "gate_free: -e 1 means --gate none, not sigmoid"),
        ("-n 2", "num_nodes: 2 machines need a launcher"),
        ("-d 1 -S 0", "deepspeed_offload: -d 1 needs ZeRO stage 1 to 3"),
        ("-m 1", "max_length: '1' is wrong"),
        ("-l 0", "lr: '0' is wrong"),
        ("--min-lr-ratio 0.1", "min_lr_ratio: rwkv-distill has its own final rate"),
        ("-s 1 -F 1", "full_params: belongs to stage 2 and 3, not to --stage 1"),
        ("-s 3 --kl-weight 2", "kl_weight: belongs to stage 2, not to --stage 3"),
        ("-s 1 -i tiny", "teacher_model_id: belongs to stage 2"),
        ("-W cpu --kernels cuda", "wkv: -W cpu means --kernels cpu, not cuda"),
        ("-s 4", "stage: '4' is wrong"),
        ("--save-interval 8 --save-every 3", "save_interval: is another word for --save-every"),
        ("--wandb-mode offline --wandb online", "wandb_mode: is another word for --wandb"),
        ("-s 2 --mlp-lora-rank 4 -z 1", "mlp_lora_rank: -z 1 leaves the MLPs as they are"),
        ("-s 1 --mlp-lora-rank 4", "mlp_lora_rank: belongs to stage 2 and 3"),
    ],
)
def test_contradictions_are_refused(line: str, message: str) -> None:
    result = invoke(line)
    assert isinstance(result.exception, ConfigError) or result.exit_code == 2
    assert message in str(result.exception) + result.output


def test_other_spellings_settle_to_the_shared_options() -> None:
    config = settle(build(TrainConfig, {**VALUES, "need_to_pad": True, "gate_free": True, "deepspeed_offload": True, "device": "cpu"}))
    assert (config.packing, config.student.gate, config.offload) == ("stream", "none", "none")
    assert settle(build(TrainConfig, {**VALUES, "wkv": "torch", "device": "cpu"})).kernels == "reference"
    assert settle(build(TrainConfig, {**VALUES, "batching": "pad", "device": "cpu"})).packing == "document"


@pytest.mark.parametrize("shape", ["exp", "cosine", "linear"])
def test_rate_goes_from_first_to_final(shape: str) -> None:
    rates = [rate(s, s / 40, 6e-4, 1e-5, 10, shape) for s in range(40)]
    assert rates[0] == pytest.approx(6e-6)
    assert rates[10] == pytest.approx(6e-4)
    assert rates[-1] == pytest.approx(1e-5)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_exponential_has_one_ratio() -> None:
    rates = [rate(s, s / 10, 1.0, 0.01, 0, "exp") for s in range(10)]
    assert all(b / a == pytest.approx(rates[1]) for a, b in pairwise(rates))


def test_warmup_longer_than_the_run_ends_with_it() -> None:
    rates = [rate(s, s / 5, 1.0, 0.1, 50, "exp") for s in range(5)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(1.0)


def test_budget_is_tokens_or_epochs_unless_it_is_given() -> None:
    assert build(TrainConfig, {**VALUES, "max_trained_tokens": "20k"}).limits().limits == {"tokens": 20_000, "epochs": 1}
    assert build(TrainConfig, {**VALUES, "budget": "3 steps"}).limits().limits == {"steps": 3}


def test_both_presets_set_the_same_fields() -> None:
    assert PRESETS["arwkv"].keys() == PRESETS["rad"].keys()


def test_help_names_every_default() -> None:
    output = CliRunner().invoke(cli, ["train", "--help"]).output
    assert re.search(r"--lr-final NUMBER.*default: 1e-05", output, re.DOTALL)


def read(text: str, tmp_path: Path, line: str = "") -> Any:
    (tmp_path / "file.yaml").write_text(text)
    return CliRunner().invoke(cli, ["train", "-c", str(tmp_path / "file.yaml"), "--print-config", *shlex.split(line)])


def test_files_by_topic_say_the_same(tmp_path: Path) -> None:
    text = """
teacher: {model_id: tiny, revision: null, trust_remote_code: false}
student: {layers: [0], preset: rad, lora: {decay: 16}, init: random, calibrate: false}
loss: {kl_weight: 0.5, ce_weight: 0.5, align: mse}
data: {raw: [synthetic:markov, synthetic:copy], weights: [0.3, 0.7], text_field: story, batching: null}
train: {stage: 1, lr: 1.0e-3, kl_weight_: 1}
"""
    result = read(text, tmp_path)
    assert "kl_weight_: is not an option" in result.output
    # a weight of stage 2 is no choice in a file of stage 1
    found = yaml.safe_load(
        read(text.replace(", kl_weight_: 1", "").replace("kl_weight: 0.5, ce_weight: 0.5, ", ""), tmp_path, "-l 0.002").stdout
    )
    assert (found["model"], found["calibrate"], found["align_loss"], found["text_column"], found["lr"]) == (
        "tiny",
        False,
        "mse",
        "story",
        0.002,
    )
    assert found["data"] == ["synthetic:markov@0.3", "synthetic:copy@0.7"]
    student = found["student"]
    assert (student["layers"], student["preset"], student["lora"], student["init"]) == ([0], "rad", {"decay": 16}, "random")


def test_files_of_the_original_code_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "{Llama: {model_id: tiny}, RWKV: {layers: [1], grad_cp: 0}, is_sft: true, teach_mode: x, data: [synthetic:markov]}"
    found = yaml.safe_load(read(text, tmp_path).stdout)
    assert (found["model"], found["student"]["layers"], found["gradient_checkpointing"], found["stage"]) == ("tiny", [1], False, 3)
    assert "teach_mode: ignored" in caplog.text
    found = yaml.safe_load(read("{Llama: {model_id: tiny}, enable_AKL: true, stage: 2, data: [synthetic:markov]}", tmp_path).stdout)
    assert found["kl_direction"] == "adaptive"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{model: tiny, teacher: {model_id: tiny}}", "teacher.model_id: model is given twice"),
        ("{teacher: {model_id: tiny, revision: main}}", "teacher.revision: main is not supported"),
        ("{model: tiny, loss: {kl: 1}}", "loss.kl: is not an option; known: kl_weight"),
        ("{model: tiny, data: {raw: [a, b], weights: [1]}}", "data.weights: 1 weights for 2 sources"),
    ],
)
def test_files_that_contradict_themselves_are_refused(text: str, message: str, tmp_path: Path) -> None:
    result = read(text, tmp_path)
    assert result.exit_code == 2
    assert message in result.output


def test_the_flags_that_remain_parse() -> None:
    found = yaml.safe_load(invoke("-p a -p b -D name --padding-side left --save-interval 8 --wandb-mode offline -W ''").stdout)
    assert (found["preprocessed_data"], found["run_name"], found["padding_side"], found["save_interval"]) == (["a", "b"], "name", "left", 8)
    settled = settle(build(TrainConfig, {**VALUES, "save_interval": 10, "wandb_mode": "offline", "wkv": "", "device": "cpu"}))
    # four micro-batches make an update
    assert (settled.save_every, settled.wandb, settled.kernels) == ("3", "offline", "auto")
    assert settle(build(TrainConfig, {"model": "tiny", "preprocessed_data": ["a"], "device": "cpu"})).packing == "document"


def test_there_are_four_processes_but_no_more_than_gpus() -> None:
    def found(line: str, gpus: int) -> int:
        return processes(build(TrainConfig, {**VALUES, **({"num_processes": int(line)} if line else {})}), gpus)

    assert [found("", gpus) for gpus in (0, 1, 3, 8)] == [1, 1, 3, 4]
    assert (found("8", 8), found("2", 0)) == (8, 2)
    with pytest.raises(ConfigError, match="num_processes: 3 processes need as many GPUs, and 2 can be seen; use -G 2"):
        found("3", 2)


def test_fla_is_refused_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    result = CliRunner().invoke(cli, shlex.split("train --model tiny -W fla -r synthetic:markov --device cpu -o x"))
    assert result.exit_code == 2
    assert "-W fla needs flash-linear-attention; pip install flash-linear-attention" in result.output
    there = ModuleType("fla")
    there.__spec__ = ModuleSpec("fla", None)
    monkeypatch.setitem(sys.modules, "fla", there)
    for cuda, precision, message in ((False, "bf16", "needs a GPU"), (True, "fp32", "computes in half precision, not --dtype fp32")):
        with pytest.raises(ConfigError, match=message):
            require_fla(cuda, precision)
    require_fla(True, "bf16")


def test_f_0_is_off_in_every_stage() -> None:
    for stage in (1, 2, 3):
        assert yaml.safe_load(invoke(f"-s {stage} -F 0 -z 0 -e 0 -N 0 -d 0").stdout)["full_params"] is False
