"""Every method on a real Slurm: a job of one task on each of two nodes, warned half-way, saved, queued again, and finished."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.repo.tree import ROOT, Package, methods

DAEMONS = ("slurmctld", "slurmd", "sbatch")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not all(map(shutil.which, DAEMONS)), reason=f"needs {', '.join(DAEMONS)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd runs as root"),
]
STEPS = 40

SETTINGS = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
# a job that is queued again waits as long as a credential lives, by default two minutes
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
NodeName=n[0-1] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs={cores}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    for start in range(17000, 19000, count):
        try:
            for port in range(start, start + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return start
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach a cluster of two nodes on this machine."""
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    (folder / "state").mkdir()
    port, host = free_ports(3), socket.gethostname()
    settings = folder / "slurm.conf"
    settings.write_text(SETTINGS.format(host=host, port=port, first=port + 1, second=port + 2, folder=folder, cores=os.cpu_count()))
    environment = {**os.environ, "SLURM_CONF": str(settings)}
    daemons = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "n0"], ["slurmd", "-D", "-N", "n1"]]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for command in daemons]
    try:
        until(lambda: "idle" in said(environment, "sinfo", "--noheader", "--format=%D %T").removeprefix("2 "), 60)
        yield environment
    finally:
        said(environment, "scancel", "--user=root")
        until(lambda: not said(environment, "squeue", "--noheader"), 60)
        for daemon in reversed(running):
            daemon.terminate()
            daemon.wait()


def said(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.3)


# a launcher of its own header is the batch script itself; one method stands for all
@pytest.mark.parametrize(
    ("package", "wrapped"), [*((package, True) for package in methods()), (methods()[0], False)],
    ids=[*(package.name for package in methods()), "batch script"],
)  # fmt: skip
def test_a_job_that_is_warned_saves_is_queued_again_and_ends_as_if_nothing_had_happened(
    package: Package, wrapped: bool, cluster: dict[str, str], tmp_path: Path
) -> None:
    preset = package.folder / "presets/tiny.yaml"
    command = preset.read_text().splitlines()[0].removeprefix("# ").partition(" --output-dir")[0]
    script = tmp_path / "job.sh"
    script.write_text(f'#!/usr/bin/env bash\nset -euo pipefail\nsource {ROOT}/launchers/lib.sh\nlaunch {command} "$@"\n')
    output, printed = tmp_path / "run", tmp_path / "printed.txt"
    options = [
        "--output-dir",
        str(output),
        "--budget",
        f"{STEPS} steps",
        "--save-every",
        "5",
        "--eval-every",
        "never",
        "--log-every",
        "1",
        "--micro-batch-size",
        "2",
    ]
    # the nodes' names do not resolve
    job = {**cluster, "LAUNCHER": "torchrun", "PROCESSES": "1", "MASTER_ADDR": "127.0.0.1", "NUM_NODES": "2"}
    words = [
        "sbatch",
        "--parsable",
        "--nodes=2",
        f"--output={printed}",
        *(["launchers/slurm.sh", str(script)] if wrapped else ["--open-mode=append", str(script), "--resume", "auto"]),
        *options,
    ]
    number = subprocess.run(words, env=job, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    def state(field: str) -> str:
        shown = dict(word.partition("=")[::2] for word in said(cluster, "scontrol", "show", "job", number).split())
        return shown.get(field, "")

    until(lambda: (output / "checkpoints/checkpoint-5").exists() or state("JobState") == "FAILED", 200)
    said(cluster, "scancel", "--signal=USR1", "--batch", number)
    until(lambda: state("Restarts") == "1" or state("JobState") == "FAILED", 120)
    until(lambda: state("JobState") in ("COMPLETED", "FAILED"), 300)
    assert (state("JobState"), state("Restarts")) == ("COMPLETED", "1"), printed.read_text()
    assert json.loads((output / "result.json").read_text())["progress"]["steps"] == STEPS
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "train/loss" in record]
    assert steps == list(range(1, STEPS + 1)), "every step once, in order"
