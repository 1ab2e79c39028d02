"""Scripts for machines and jobs, with stubs in the place of Slurm's and torch's commands."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "launchers/mdm_scaling"
STUBS = {
    # a step that saves when it is told to end
    "srun": """printf '%q ' "$@" > "$STUB/srun"; trap 'exit 130' TERM; echo $$ > "$STUB/new"; mv "$STUB/new" "$STUB/pid"; while :; do sleep 0.05; done""",
    "scancel": """echo "$@" > "$STUB/scancel"; kill -TERM "$(cat "$STUB/pid")\"""",
    "scontrol": """[ "$1" = show ] && printf 'first\\nsecond\\n' || echo "$@" >> "$STUB/scontrol\"""",
    "torchrun": """printf '%q ' torchrun "$@"; echo""",
}


@pytest.fixture
def place(tmp_path: Path) -> dict[str, str]:
    """An environment in which the stubs are found; they write into its STUB."""
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_", "NODE_", "NUM_NODES"))}
    return {**kept, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STUB": str(tmp_path)}


def words(script: str, *options: str, **environment: str) -> dict[str, str]:
    """The options of the command that a script runs, or prints."""
    run = subprocess.run(["bash", str(SCRIPTS / script), *options], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    last = shlex.split(run.stdout.splitlines()[-1])
    return dict(pairwise(last))


def test_a_job_is_saved_before_its_limit_and_queued_again(place: dict[str, str]) -> None:
    stub = Path(place["STUB"])
    command = ["bash", str(SCRIPTS / "mdm_slurm.sbatch"), "--objective", "mdm", "--save", "runs/with space"]
    job = subprocess.Popen(command, env={**place, "SLURM_JOB_ID": "7"}, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (stub / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 130
    assert (stub / "scontrol").read_text() == "requeue 7\n"
    assert (stub / "scancel").read_text() == "--signal=TERM 7\n"
    step = shlex.split((stub / "srun").read_text())
    assert step[-6:] == ["--objective", "mdm", "--save", "runs/with space", "--resume", "auto"]
    header = (SCRIPTS / "mdm_slurm.sbatch").read_text()
    assert "#SBATCH --signal=B:USR1@120" in header
    assert "#SBATCH --requeue" in header


def test_a_cancelled_job_is_not_queued_again(place: dict[str, str]) -> None:
    stub = Path(place["STUB"])
    job = subprocess.Popen(
        ["bash", str(SCRIPTS / "mdm_slurm.sbatch"), "sweep 1.jsonl"],
        env={**place, "SLURM_JOB_ID": "7"},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not (stub / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(int((stub / "pid").read_text()), signal.SIGTERM)
    assert job.wait(30) == 130
    assert not (stub / "scontrol").exists()
    # a manifest is not resumed as one run
    assert shlex.split((stub / "srun").read_text())[-3:] == ["sweep 1.jsonl", "--retry", "preempted"]


def test_a_machine_of_a_job_knows_its_number_and_the_first_one(place: dict[str, str]) -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x[1-2]"}
    found = words("mdm_multi_node.sh", "--objective", "mdm", "--save", "runs/with space", **place, **slurm, PROCESSES="8")
    assert [found[name] for name in ("--nnodes", "--node-rank", "--nproc-per-node")] == ["2", "1", "8"]
    assert [found[name] for name in ("--master-addr", "--master-port", "--save")] == ["first", "20007", "runs/with space"]


def test_machines_that_are_named_agree_on_where_they_meet(place: dict[str, str]) -> None:
    hosts = ["--hosts", f"first,{socket.gethostname()}", "--objective", "mdm"]
    here = words("mdm_multi_node.sh", *hosts, **place, DRY_RUN="1")
    there = words("mdm_multi_node.sh", *hosts, **place, DRY_RUN="1", NODE_RANK="0")
    assert (here["--nnodes"], here["--node-rank"], there["--node-rank"]) == ("2", "1", "0")
    assert here["--master-addr"] == there["--master-addr"] == "first"
    assert 20000 <= int(here["--master-port"]) == int(there["--master-port"]) < 40000
    other = words("mdm_multi_node.sh", *hosts, "--seed", "7", **place, DRY_RUN="1")
    assert other["--master-port"] != here["--master-port"]


def test_a_machine_that_is_not_named_is_told_so(place: dict[str, str]) -> None:
    command = ["bash", str(SCRIPTS / "mdm_multi_node.sh"), "--hosts", "first,second", "--objective", "mdm"]
    run = subprocess.run(command, capture_output=True, text=True, env={**place, "DRY_RUN": "1"}, cwd=ROOT)
    assert run.returncode == 2
    assert "is none of first second; name it as 'hostname' does, or set NODE_RANK" in run.stderr
