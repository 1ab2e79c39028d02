"""Launcher scripts print a command under DRY_RUN=1, and that command's options exist."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.repo.test_commands import SCRIPTS, group
from tests.repo.tree import ROOT

# scripts that start training alone; pipelines of commands are tested by their package
ELSEWHERE = ("lib.sh", "local_smoke.sh", "compare_splits.sh", "slurm_pretrain.sh")
JOBS = sorted(path for path in ROOT.glob("launchers/*/**/*.sh") if path.name not in ELSEWHERE)
each_job = pytest.mark.parametrize("script", JOBS, ids=lambda path: f"{path.parent.name}/{path.name}")
# what the scripts of moe-cpt refuse to guess
PATHS = {"MODEL": "model", "DATA": "synthetic:markov", "VALID": "synthetic:markov", "HOSTFILE": "hosts"}


def dry_run(*command: str, **environment: str) -> list[list[str]]:
    """The words of every command that a launcher prints."""
    environment = {**os.environ, "DRY_RUN": "1", **(PATHS if "/moe_cpt/" in command[0] else {}), **environment}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    return [words for line in run.stdout.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize(
    "path", sorted(path for path in ROOT.glob("launchers/**/*") if path.suffix in (".sh", ".sbatch")), ids=lambda path: path.name
)
def test_scripts_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", str(path)], check=True, cwd=ROOT)
    assert "set -euo pipefail" in path.read_text() or path.name == "lib.sh"


@each_job
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "none"])
def test_printed_command_has_options_that_exist(script: Path, launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in dry_run(str(script), "--seed", "7", LAUNCHER=launcher):
        at = next(at for at, word in enumerate(words) if word in SCRIPTS)
        group(SCRIPTS[words[at]]).main([*words[at + 1 :], "--print-config"], standalone_mode=False)
        # what reads finished runs starts no processes, and has no seed
        if words[at + 1] != "compare":
            assert words[0] == {"none": words[0]}.get(launcher, launcher)
            assert "seed: 7" in capsys.readouterr().out


@each_job
def test_several_machines_come_from_the_environment(script: Path) -> None:
    words, *_ = dry_run(str(script), LAUNCHER="torchrun", NUM_NODES="2", NODE_RANK="1", MASTER_ADDR="first", PROCESSES="8")
    at = {word: words[index + 1] for index, word in enumerate(words[:-1]) if word.startswith("--")}
    assert [at["--nnodes"], at["--node-rank"], at["--master-addr"], at["--nproc-per-node"]] == ["2", "1", "first", "8"]


def test_slurm_runs_a_script_once_per_machine_and_resumes() -> None:
    (words,) = dry_run("launchers/slurm.sh", "launchers/x.sh", "--seed", "1", SLURM_JOB_ID="7")
    assert words == ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "bash", "launchers/x.sh", "--seed", "1", "--resume", "auto"]
    (words,) = dry_run("launchers/lowrank_opt/slurm_pretrain.sh", "1b", "galore8bit", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(ROOT))
    assert words[3:] == ["bash", f"{ROOT}/launchers/lowrank_opt/pretrain_c4.sh", "1b", "galore8bit", "--resume", "auto"]


def test_a_job_of_an_array_makes_its_share_of_a_manifest() -> None:
    script, place = "launchers/mdm_scaling/mdm_sweep_array.sbatch", {"SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "16"}
    (words,) = dry_run(script, "sweep 1.jsonl", "--out", "runs", SLURM_JOB_ID="7", SLURM_ARRAY_TASK_ID="7", **place)
    assert words[:2] == ["srun", "--ntasks=1"]
    at = words.index("mdm-scaling")
    assert words[at:] == ["mdm-scaling", "runs", "start", "sweep 1.jsonl", "--part", "3/16", "--retry", "preempted", "--out", "runs"]
    group(SCRIPTS["mdm-scaling"]).main([*words[at + 1 :], "--print-config"], standalone_mode=False)


def test_scripts_of_lowrank_opt_take_size_task_and_optimizer_by_place() -> None:
    (words,) = dry_run("launchers/lowrank_opt/pretrain_c4.sh", "7b", "apollo", "--seed", "7", LAUNCHER="none")
    at = {word: words[index + 1] for index, word in enumerate(words[:-1]) if word.startswith("--")}
    assert [at["--model"], at["--optimizer"], at["--lr"], at["--apollo-rank"], at["--seed"]] == ["llama_7b", "apollo", "0.005", "1024", "7"]
    (words,) = dry_run("launchers/lowrank_opt/finetune_glue.sh", "rte", LAUNCHER="none", DATA="x.jsonl")
    assert words[words.index("--task") + 1] == "rte"
    assert words[words.index("--data") + 1] == "x.jsonl"


def test_an_unknown_launcher_is_refused() -> None:
    run = subprocess.run([str(JOBS[0])], capture_output=True, text=True, env={**os.environ, "DRY_RUN": "1", "LAUNCHER": "mpi"})
    assert run.returncode == 2
    assert "LAUNCHER: 'mpi' is unknown; use torchrun" in run.stderr
