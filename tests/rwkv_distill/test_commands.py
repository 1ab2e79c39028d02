"""Every command as a user runs it, on a tiny student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rwkv_distill.cli import cli

TRAIN = "train --model tiny --tokenizer bytes --data synthetic:markov[60] -m 32 -b 4 -a 1 --head-size 32 -w 1 -T 0 --device cpu --eval-every never --no-tensorboard"


def invoke(line: str, *more: str) -> Any:
    result = CliRunner().invoke(cli, [*line.split(), *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def refused(line: str) -> str:
    result = CliRunner().invoke(cli, line.split())
    assert result.exit_code == 2
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    invoke(f"{TRAIN} -s 1 --budget 3steps", "-o", str(place / "s1"))
    invoke(f"{TRAIN} -s 2 -k {place}/s1/final/pytorch_model.bin --budget 3steps", "-o", str(place / "s2"))
    return place


def test_stage_2_starts_from_stage_1_and_makes_a_folder_that_generates(folder: Path) -> None:
    result = invoke(f"generate --model {folder}/s2 --max-new-tokens 5 --json", "--prompt", "ab")
    assert len(json.loads(result.stdout)["tokens"]) == 5
    streamed = invoke(f"generate --model {folder}/s2/final --max-new-tokens 5 --stream", "--prompt", "ab")
    assert streamed.stdout.startswith("ab")


def test_eval_of_a_student_against_its_teacher(folder: Path) -> None:
    command = f"eval --model {folder}/s2/final --teacher tiny --data synthetic:markov[40] -m 32 --prompts 2 --max-new-tokens 4 --json"
    report = json.loads(invoke(command).stdout)
    found = report["sources"]["markov"]
    assert 0 < found["kl"]["median"] <= found["kl"]["p95"]
    assert found["loss"]["student"] == pytest.approx(found["loss"]["teacher"], abs=0.1)
    assert 0 <= report["generation"]["agreement_length"] <= 4
    assert list(found["kl_by_position"]) == ["0-3", "4-7", "8-11", "12-15", "16-19", "20-23", "24-27", "28-31"]


def test_eval_of_a_student_that_is_its_teacher_finds_no_difference(folder: Path, tmp_path: Path) -> None:
    from lm_core.data.vocab import byte_tokenizer
    from lm_core.models import load_model
    from rwkv_distill.config import MODELS
    from rwkv_distill.student import StudentModel
    from rwkv_distill.student_config import StudentConfig

    same = StudentModel.from_teacher(load_model("tiny", presets=MODELS, seed=42), StudentConfig(layers=[]))
    same.save_pretrained(tmp_path / "same")
    byte_tokenizer().save_pretrained(tmp_path / "same")
    command = f"eval --model {tmp_path}/same --teacher tiny --data synthetic:markov[40] -m 32 --prompts 2 --max-new-tokens 6 --json"
    report = json.loads(invoke(command).stdout)
    assert report["sources"]["markov"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert report["sources"]["markov"]["top_agreement"] == {"1": 1.0, "5": 1.0, "50": 1.0}
    assert report["generation"]["agreement_length"] == 6


@pytest.mark.parametrize("source", ["s2", "s2/final", "s2/checkpoints/checkpoint-3"])
def test_export_takes_a_run_a_final_folder_or_a_checkpoint(folder: Path, source: str, tmp_path: Path) -> None:
    invoke(f"export --ckpt {folder}/{source} --dtype fp32", "-o", str(tmp_path / "out"))
    before, after = (
        invoke(f"generate --model {place} --max-new-tokens 6", "--prompt", "ab").stdout for place in (folder / "s2", tmp_path / "out")
    )
    assert before == after
    assert "already holds files" in refused(f"export --ckpt {folder}/{source} -o {tmp_path}/out")


def test_dry_run_leaves_nothing(tmp_path: Path) -> None:
    result = invoke(f"{TRAIN} -s 2 --budget 3steps --dry-run --json", "-o", str(tmp_path / "run"))
    counts = json.loads(result.stdout)["parameters"]
    assert 0 < counts["trained"] < counts["total"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command", ["generate --model {0}", "eval --model {0} --teacher tiny --data synthetic:markov", "export --ckpt {0} -o {0}/out"]
)
def test_folders_without_a_student_are_refused(command: str, tmp_path: Path) -> None:
    assert "holds no student" in refused(command.format(tmp_path))


def test_bench_finds_that_memory_grows_neither_with_depth_nor_with_context() -> None:
    stage1 = json.loads(invoke("bench --op stage1 --json").stdout)["stage1"]
    assert stage1["layer_local"]["ratio"] <= 1.3
    assert stage1["plain"]["ratio"] > 2.5
    contexts = json.loads(invoke("bench --op decode --context 512 --tokens 2 --teacher tiny --json").stdout)["decode"]
    student, teacher = ([entry["state_bytes"] for entry in contexts[side]["contexts"].values()] for side in ("student", "teacher"))
    assert student[0] == student[1]
    # 64 and 512 tokens, and the two decoded behind each
    assert teacher[1] * 66 == teacher[0] * 514


@pytest.mark.bench
def test_bench_meets_its_targets() -> None:
    report = json.loads(invoke("bench --json").stdout)
    found = [*report["wkv7"].values(), report["pack"]]
    assert all(entry["ratio"] >= entry["at_least"] for entry in found if isinstance(entry, dict))
    assert report["decode"]["student"]["slowest_over_first"]["ratio"] <= 1.1
