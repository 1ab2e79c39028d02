"""Contradictions in Slurm scripts: one script per rule that breaks it, and the shipped scripts, which break none."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe_cpt.cli import cli
from moe_cpt.slurm import Finding, check_slurm
from tests.moe_cpt.test_commands import call

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path for path in (ROOT / "launchers/moe_cpt").rglob("*.sh") if path.name not in ("lib.sh", "local_smoke.sh", "compare_splits.sh")
)
# max_steps, global batch size and tokens per batch that the guide names
HEADERS = {
    "16_2/baseline_112gpus_sheared_llama_portion_fluency_sf8": (13623, 3584, 14680064),
    "8_2/baseline_112gpus_sheared_llama_portion_fluency_sf4": (13623, 3584, 14680064),
    "dynamic_data_selection/baseline_112gpus_sheared_llama_portion_fluency": (13623, 3584, 14680064),
    "dynamic_data_selection/sheared_llama_112gpus": (13623, 3584, 14680064),
    "lora": (190734, 256, 524288),
    "fpt": (190734, 256, 524288),
}
GOOD = """#!/usr/bin/env bash
#SBATCH --job-name=x
#SBATCH -p MoE
#SBATCH -N 6
#SBATCH --ntasks-per-node 1
#SBATCH --gres=gpu:h200:8
#SBATCH --cpus-per-task=64
#SBATCH --output=logs/%x-%j.log
#SBATCH -e logs/%x-%j.log
num_nodes=6; num_gpu_per_node=8
export per_device_train_batch_size=16
gradient_accumulation_steps=1
block_size=$((1024 * 2))
num_tokens='10^11'
torchrun --nnodes=$num_nodes --nproc_per_node "$num_gpu_per_node" x
"""
HEADER = "max_steps: 63578\nglobal batch size: 768\n#tokens/batch: 1572864\nmore\n"


def findings(text: str, folder: Path, **options: object) -> list[Finding]:
    (folder / "logs").mkdir(exist_ok=True)
    return check_slurm(text, folder=folder, **options)  # type: ignore[arg-type]


def test_a_consistent_script_and_the_header_of_its_log_have_no_findings(tmp_path: Path) -> None:
    assert findings(GOOD, tmp_path, header=HEADER) == []


@pytest.mark.parametrize(
    ("old", "new", "code", "lines"),
    [
        ("-N 6", "-N 14", "S01", [4, 10]),
        ("num_nodes=6;", "", "S01", [4]),
        ("gpu:h200:8", "gpu:h200:4,gpu:a100:2", "S02", [6, 10]),
        ("--gres=gpu:h200:8", "--gpus-per-node=h200:4", "S02", [6, 10]),
        ("--ntasks-per-node 1", "--ntasks-per-node=8", "S03", [5]),
        ("#SBATCH --ntasks-per-node 1\n", "", "S03", []),
        ("cpus-per-task=64", "cpus-per-task=256", "S04", [7]),
        ("#SBATCH -p MoE\n", "", "S05", []),
        ("--output=logs/", "--output=elsewhere/", "S06", [8]),
        ("--output=logs/%x-%j.log", "--output=logs/x.log", "S07", [8]),
        ("=$num_nodes", "=5", "S09", [15, 10]),
        ('"$num_gpu_per_node" x', "4 x", "S09", [15, 10]),
    ],
)
def test_each_contradiction_is_found_where_it_is(old: str, new: str, code: str, lines: list[int], tmp_path: Path) -> None:
    assert old in GOOD
    (found,) = findings(GOOD.replace(old, new), tmp_path)
    assert (found.code, found.severity, found.lines) == (code, "error", lines)


def test_a_finding_says_both_lines_and_both_ways_out(tmp_path: Path) -> None:
    (found,) = findings(GOOD.replace("-N 6", "-N 14"), tmp_path)
    assert str(found) == "S01 error --nodes (line 4: 14) != num_nodes (line 10: 6). Set num_nodes=14, or --nodes=6."


def test_a_log_of_other_settings_is_noticed_and_what_is_no_literal_is_said(tmp_path: Path) -> None:
    (found,) = findings(GOOD, tmp_path, header=HEADER.replace("768", "384"))
    assert (found.code, found.field, found.expected) == ("S08", "global batch size", "768")
    unknown = findings(GOOD.replace("num_nodes=6;", "num_nodes=$NODES;"), tmp_path, header=HEADER)
    assert {(finding.code, finding.severity) for finding in unknown} == {("S01", "warning"), ("S08", "warning")}


def test_paths_and_the_type_of_a_checkpoint_are_looked_up(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    text = GOOD + "model_type=llama_moe\npretrained_model=model\ndataset_dir=data/none\n"
    assert [(found.code, found.severity, found.lines) for found in findings(text, tmp_path)] == [
        ("S10", "error", [16, 17]),
        ("S11", "warning", [18]),
    ]


def test_the_command_leaves_with_3_prints_json_and_makes_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.sh").write_text(GOOD)
    result = CliRunner().invoke(cli, ["slurm", "check", "x.sh", "--json"])
    assert result.exit_code == 3
    assert {found["code"] for found in json.loads(result.stdout)["findings"]} == {"S06"}
    assert call("slurm", "check", "x.sh", "--fix") == {"findings": []}
    assert (tmp_path / "logs").is_dir()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_shipped_scripts_pass_and_print_what_their_log_will_say(script: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "DRY_RUN": "1", "LAUNCHER": "none", "MODEL": "m", "DATA": "synthetic:markov", "VALID": "synthetic:markov"}
    run = subprocess.run([str(script)], capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    header = re.sub(r"^# ", "", run.stdout, flags=re.MULTILINE)
    assert findings(script.read_text(), tmp_path, header=header) == []
    numbers = tuple(int(line.rpartition(" ")[2]) for line in header.splitlines()[:3])
    assert numbers == HEADERS[str(script.relative_to(ROOT / "launchers/moe_cpt").with_suffix(""))]
    # the run itself says the same
    words = shlex.split(run.stdout, comments=True)
    resolved = call(*words[1:], "--print-config")
    from lm_core.config import build
    from moe_cpt.config import TrainConfig

    plan = build(TrainConfig, resolved).plan()
    assert (plan.max_steps, plan.global_batch, plan.tokens_per_batch) == numbers


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_for_other_machines_is_consistent(script: Path, tmp_path: Path) -> None:
    call("slurm", "render", script, "--nodes", 3, "--gpus", 4, "-o", tmp_path / "new.sh")
    text = (tmp_path / "new.sh").read_text()
    assert findings(text, tmp_path) == []
    assert "#SBATCH --nodes=3\n" in text
    assert "\nnum_nodes=3\nnum_gpu_per_node=4\n" in text


def test_in_a_batch_script_every_machine_learns_its_own_number(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'first\\nsecond\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "70001",
        "SLURM_JOB_NODELIST": "x",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NAME": "moe_lora",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    environment = {
        **os.environ,
        **slurm,
        "DRY_RUN": "1",
        "MODEL": "m",
        "DATA": "d",
        "VALID": "v",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    copy = tmp_path / "slurm_script"
    copy.write_text((ROOT / "launchers/moe_cpt/lora.sh").read_text())
    run = subprocess.run(["bash", str(copy)], capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    words = shlex.split(run.stdout, comments=True)
    assert words[:6] == [
        "srun",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "bash",
        "-c",
        'exec torchrun --node-rank "$SLURM_NODEID" "$@"',
    ]
    at = {word: words[index + 1] for index, word in enumerate(words[:-1]) if word.startswith("--")}
    assert (at["--nnodes"], at["--master-addr"], at["--master-port"], at["--output_dir"]) == (
        "2",
        "first",
        "30001",
        "outputs/moe_lora-70001",
    )


def test_a_job_keeps_what_started_it(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "moe_fpt", "SLURM_SUBMIT_DIR": str(ROOT), "MODEL": "m", "DATA": "d", "VALID": "v"}
    environment = {
        **os.environ,
        **slurm,
        "COMMENT": "first try",
        "OUT": str(tmp_path / "outputs/a"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    script = ROOT / "launchers/moe_cpt/fpt.sh"
    subprocess.run(["bash", str(script)], env=environment, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "outputs/a/sbatch.sh").read_text() == script.read_text()
    assert "job: 12\n" in (tmp_path / "outputs/a/comment.txt").read_text()
    assert "comment: first try\n" in (tmp_path / "outputs/a/comment.txt").read_text()
    assert (tmp_path / "outputs/latest.jobid").read_text() == "12\n"
    assert (tmp_path / "outputs/latest.dir").resolve() == tmp_path / "outputs/a"
    assert os.readlink(tmp_path / "outputs/latest.log") == str(tmp_path / "logs/moe_fpt-12.log")


def test_a_run_on_other_machines_than_it_names_stops_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("train", "--model", "no/such/model", "--data", "x", "--num_nodes", 2, "--num_gpu_per_node", 8)
    monkeypatch.setenv("SLURM_NNODES", "14")
    assert "num_nodes: 2, but SLURM_NNODES is 14" in call(*words, code=2)
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert "num_gpu_per_node: 8, but SLURM_GPUS_ON_NODE is 4" in call(*words, code=2)


def test_paths_that_are_not_set_are_named() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("MODEL", "DATA", "VALID")}
    run = subprocess.run([str(SCRIPTS[0])], capture_output=True, text=True, env={**environment, "MODEL": "m"})
    assert run.returncode == 2
    assert "error: DATA: not set" in run.stderr


def test_runs_are_shown_under_short_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        for time in ("Nov01_10-00-00_h", "Nov02_10-00-00_h"):
            (tmp_path / name / "runs" / time).mkdir(parents=True)
    os.utime(tmp_path / "two" / "runs" / "Nov02_10-00-00_h", (1, 1))
    words = call("tb-spec", f"base:{tmp_path}/one", f"{tmp_path}/tw*", "--port", 9000)["command"]
    assert words == [
        "tensorboard",
        "--logdir_spec",
        f"base:{tmp_path}/one/runs/Nov02_10-00-00_h,two:{tmp_path}/two/runs/Nov01_10-00-00_h",
        "--port",
        "9000",
    ]
    assert "are both called one; write NAME:FOLDER" in call("tb-spec", f"{tmp_path}/one", f"one:{tmp_path}/two", code=2)
    assert "matches no folder" in call("tb-spec", f"{tmp_path}/three*", code=2)


@pytest.mark.parametrize("script", ["local_smoke.sh", "compare_splits.sh"])
def test_pipelines_print_commands_whose_options_exist(script: str) -> None:
    environment = {**os.environ, "DRY_RUN": "1", "OUT": "out"}
    run = subprocess.run([str(ROOT / "launchers/moe_cpt" / script)], capture_output=True, text=True, env=environment, check=True)
    commands = [shlex.split(line) for line in run.stdout.splitlines()]
    assert len(commands) > 7
    for words in commands:
        found = call(*words[1:], "--print-config")
        assert "out" in json.dumps(found)
        if words[1] == "convert" and "ridge" in words:
            assert found["calibration_data"][0].startswith(("builtin:", "synthetic:"))


@pytest.mark.slow
def test_the_whole_pipeline_runs_on_a_tiny_model(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(["bash", str(ROOT / "launchers/moe_cpt/local_smoke.sh")], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["progress"]["steps"] == 4
    assert {path.name for path in tmp_path.glob("m*")} == {"moe", "mixtral", "merged"}
