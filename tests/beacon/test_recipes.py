"""The recipes of the guide: what each launcher asks for, as the specification's table says."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from beacon.cli import cli

ROOT = Path(__file__).resolve().parents[2]
PRETRAINING = {
    "num_train_epochs": 1,
    "bf16": True,
    "precision": "bf16",
    "save_only_model": True,
    "lr": 5e-5,
    "beacon_ratio": [2, 4, 8, 16, 32],
}
TUNING = {**PRETRAINING, "lr": 1e-5, "beacon_ratio": [2, 4, 8], "save_every": "epoch", "group_by_stride": "strict"}
HALVES, EPOCHS = {"save_every": "0.49"}, {"save_every": "epoch", "group_by_stride": "strict"}
COMMON = {
    "enable_beacon": True, "beacon_attn": "step-expansion", "beacon_ratio_mix": "step-random", "beacon_param": ["q", "k", "v", "o"],
    "beacon_sink_size": 1, "gradient_checkpointing": True, "use_reentrant": False, "log_every": 50, "beacon_attend_prev": True,
    "only_train_beacon": True, "beacon_pos": None, "deepspeed_config": "launchers/conf/deepspeed/zero2.json", "beacon_doc_mask": None,
}  # fmt: skip
QWEN = {"beacon_pos": "interleave", "beacon_attn": "full-coverage", "beacon_sink_size": 0, "beacon_param": ["q", "k", "v"]}
TABLE: dict[str, dict[str, Any]] = {
    "llama2_v1": {
        "lengths": (1200, 8192), "beacon_window": 1024, "beacon_ratio": [*[2] * 5, *[4] * 5, 8, 8, 16, 16, 32, 32, 64, 128], "lr": 5e-5,
        "budget": "10000 steps", "save_every": "10000", "group_by_stride": "strict", "chat_template": "llama-2",
    },
    "llama2_pt": {**PRETRAINING, **HALVES, "beacon_window": 1024},
    "llama2_ft": {**TUNING, "lengths": (7200, 10240), "beacon_window": 1024, "chat_template": "llama-2"},
    "mistral_pt": {**PRETRAINING, **HALVES, "beacon_window": 2048, "beacon_attend_prev": False},
    "mistral_ft": {**TUNING, "lengths": (7200, 20480), "beacon_window": 2048, "beacon_attend_prev": False, "chat_template": "mistral"},
    "llama3_pt": {**PRETRAINING, **EPOCHS, "lengths": (1200, 10240), "beacon_window": 1024},
    "llama3_ft": {**TUNING, "lengths": (7200, 10240), "beacon_window": 1024, "chat_template": "llama-3"},
    "llama3_pt_packed": {**PRETRAINING, **HALVES, "beacon_window": 1024, "beacon_doc_mask": True},
    "qwen2_pt": {**PRETRAINING, **EPOCHS, **QWEN, "lengths": (2400, 20000), "beacon_window": 2048},
    "qwen2_ft": {**TUNING, **QWEN, "lengths": (7200, 20000), "beacon_window": 2048, "chat_template": "qwen"},
}  # fmt: skip


def printed(name: str, *more: str, **environment: str) -> list[str]:
    """The command of a launcher, from the package's own script on."""
    found = {**os.environ, "DRY_RUN": "1", "LAUNCHER": "none", **environment}
    run = subprocess.run(
        [ROOT / "launchers" / "beacon" / f"{name}.sh", *more], capture_output=True, text=True, cwd=ROOT, env=found, check=True
    )
    words = shlex.split(run.stdout)
    assert words[0] == "beacon"
    return words[1:]


def resolved(words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(cli, [*words, "--print-config", "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_is_its_row_of_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolved(printed(name, DATA_ROOT="/data", OUT="runs/here"), monkeypatch)
    expected = {**COMMON, **TABLE[name]}
    low, high = expected.pop("lengths", (0, 4096))
    expected |= {
        "min_length": low,
        "max_length": high,
        "beacon_stride": expected["beacon_window"],
        "data_root": "/data",
        "output_dir": "runs/here",
    }
    assert {key: found[key] for key in expected} == expected
    prefix = "long-llm:" if name.startswith("qwen2") else "activation-beacon:"
    assert all(argument.startswith(prefix) for argument in found["data"])
    if name.endswith("_ft"):
        size = "8K" if name.startswith("llama") else "16K"
        assert [argument.removeprefix(prefix) for argument in found["data"][:5]] == [
            f"gpt/one_detail_book.train.{size}.json", f"gpt/one_detail_paper.train.{size}.json", "longalpaca/train.json",
            f"booksum/train.{size}.json", f"needle/train.{size}.json",
        ]  # fmt: skip
        assert found["data"][5].endswith("[5000]")
        assert found["model"].startswith("runs/")


def test_environment_and_further_options_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolved(printed("llama2_pt", "--lr", "1e-4", EVAL_DATA="activation-beacon:eval.json"), monkeypatch)
    assert (found["eval_data"], found["eval_every"], found["lr"]) == (["activation-beacon:eval.json"], "50", 1e-4)
    packing = resolved(printed("llama3_data_2b", DATA_ROOT="/d"), monkeypatch)
    assert (packing["num_token"], packing["mixture"], packing["doc_ids"]) == (["8192:2b"], "slimpajama", True)
    assert packing["output_dir"] == "/d/pretrain/llama3-8K_2B"
    even = resolved(printed("mistral_data_100m_even"), monkeypatch)
    assert (even["num_token"], even["mixture"]) == (["16384:100m"], "even")
