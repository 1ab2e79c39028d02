"""Every method on two machines: two network namespaces joined by a cable, one process in each, started by the launchers' shell library."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.tree import ROOT, Package, methods

pytestmark = [
    pytest.mark.netns,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not shutil.which("ip"), reason="needs ip of the package iproute2"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces"),
]
STEPS = 4
ADDRESSES = ("10.99.0.1", "10.99.0.2")
# engines that meet over the network in ways of their own, and DeepSpeed's launcher; one method stands for all
OTHERS = [("torchrun", "--engine", "sharded"), ("deepspeed", "--engine", "deepspeed", "--zero-stage", "2")]


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Names of two network namespaces that see each other and nothing else."""
    names = [f"node{rank}-{os.getpid()}" for rank in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for process in left:
                os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name])


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.mark.parametrize(
    ("package", "how"),
    [*((package, ("torchrun",)) for package in methods()), *((methods()[0], how) for how in OTHERS)],
    ids=[*(package.name for package in methods()), *("-".join(how[1:]) for how in OTHERS)],
)
def test_two_machines_give_the_losses_of_one(package: Package, how: tuple[str, ...], nodes: list[str], tmp_path: Path) -> None:
    command = shlex.split(
        (package.folder / "presets/tiny.yaml").read_text().splitlines()[0].removeprefix("# ").partition(" --output-dir")[0]
    )
    command += ["--budget", f"{STEPS} steps", "--log-every", "1", "--eval-every", "never", "--save-every", "never"]
    # as many samples per step as the presets have, of which mdm-scaling names the number
    command += ["--micro-batch-size", "4", "--precision", "fp32"]
    script = tmp_path / "job.sh"
    script.write_text(f'set -euo pipefail\nsource {ROOT}/launchers/lib.sh\nlaunch {shlex.join(command)} "$@"\n')
    launcher, *engine = how
    (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    job = {"NUM_NODES": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "PROCESSES": "1", "GLOO_SOCKET_IFNAME": "cable"}
    job |= {"LAUNCHER": launcher, "HOSTFILE": str(tmp_path / "hosts")}
    logs = [tmp_path / f"{node}.log" for node in nodes]
    running = []
    for rank, (node, log) in enumerate(zip(nodes, logs)):
        words = ["ip", "netns", "exec", node, "bash", str(script), *engine, "--accumulate", "1", "--output-dir", str(tmp_path / "two")]
        with log.open("w") as file:
            environment = {**os.environ, **job, "NODE_RANK": str(rank)}
            running.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file))
    codes = [process.wait(500) for process in running]
    assert codes == [0, 0], "".join(log.read_text() for log in logs)
    subprocess.run([*command, "--accumulate", "2", "--output-dir", str(tmp_path / "one")], check=True, cwd=ROOT)
    assert len(losses(tmp_path / "one")) == STEPS
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
