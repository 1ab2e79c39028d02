"""Every method by its real command under faults: killed at random moments, one of two ranks killed, files damaged, a disk that is full.

`nox -s faults` runs it and prints what was survived; `tests/core/test_faults.py` goes through every moment of a small run.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.repo.tree import ROOT, Package, methods

pytestmark = pytest.mark.faults
each_method = pytest.mark.parametrize("package", methods(), ids=lambda package: package.name)
STEPS, KILLS = 12, 5


def command(package: Package, folder: Path, *more: str) -> list[str]:
    """The package's tiny run, shortened, into `folder`; resumed if there is something to resume."""
    words = shlex.split((package.folder / "presets/tiny.yaml").read_text().splitlines()[0].removeprefix("# ").partition(" --output-dir")[0])
    settings = {
        "budget": f"{STEPS} steps",
        "save-every": "2",
        "eval-every": "never",
        "log-every": "1",
        "micro-batch-size": "2",
        "resume": "auto",
    }
    return [*words, *(word for name, value in settings.items() for word in (f"--{name}", value)), "--output-dir", str(folder), *more]


def start(words: list[str], log: Path, **settings: Any) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file, **settings)


def complete(package: Package, folder: Path, log: Path) -> None:
    assert start(command(package, folder), log).wait() == 0, log.read_text()


def outcome(folder: Path) -> tuple[list[Any], dict[str, bytes]]:
    """Each step's loss, and the bytes of the weights."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]
    return losses, {file.name: file.read_bytes() for file in sorted((folder / "final").glob("*.safetensors"))}


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float]]:
    """The uninterrupted run of each method, made when first asked for, and its seconds."""
    return {}


def uninterrupted(package: Package, whole: dict[str, tuple[Path, float]], factory: pytest.TempPathFactory) -> tuple[Path, float]:
    if package.name not in whole:
        folder, begin = factory.mktemp(package.name) / "whole", time.monotonic()
        complete(package, folder, folder.parent / "log")
        whole[package.name] = (folder, time.monotonic() - begin)
    return whole[package.name]


@each_method
def test_kills_at_random_moments_change_nothing(package: Package, whole: Any, tmp_path_factory: Any, tmp_path: Path) -> None:
    reference, seconds = uninterrupted(package, whole, tmp_path_factory)
    chance = random.Random(package.name)
    folder, log = tmp_path / "run", tmp_path / "log"
    for _ in range(KILLS):
        child = start(command(package, folder), log)
        try:
            child.wait(chance.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    complete(package, folder, log)
    assert outcome(folder) == outcome(reference)


@each_method
def test_a_damaged_checkpoint_is_passed_over(package: Package, whole: Any, tmp_path_factory: Any, tmp_path: Path) -> None:
    reference, _ = uninterrupted(package, whole, tmp_path_factory)
    folder, log = tmp_path / "run", tmp_path / "log"
    assert start(command(package, folder, "--stop-every", "6"), log).wait() == 130
    for damage in ("cut", "flip"):
        file = max(newest(folder).glob("*.safetensors"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        if damage == "cut":
            content = content[: len(content) // 2]
        else:
            content[-1] ^= 1
        file.write_bytes(content)
        log.unlink()
        more, code = (["--stop-every", "6"], 130) if damage == "cut" else ([], 0)
        assert start(command(package, folder, *more), log).wait() == code, log.read_text()
        assert f"{file.name}" in log.read_text()
        assert "passed over" in log.read_text()
    assert outcome(folder) == outcome(reference)


@each_method
def test_one_killed_rank_of_two_is_noticed_and_both_go_on(package: Package, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    port = str(random.randint(20000, 30000))
    ranks = ["torchrun", "--nproc-per-node", "2", "--master-port", port, "--no-python", *command(package, folder)]
    child = start(ranks, log, start_new_session=True)
    end = time.monotonic() + 300
    while not (folder / "checkpoints/checkpoint-4").exists() and child.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-f", "--", str(folder)], capture_output=True, text=True).stdout.split()
    workers = [int(number) for number in found if int(number) != child.pid]
    os.kill(workers[-1], signal.SIGKILL)
    assert child.wait() != 0
    assert start(ranks, log).wait() == 0, log.read_text()
    assert json.loads((folder / "result.json").read_text())["progress"]["steps"] == STEPS
    assert [step for step, _ in outcome(folder)[0]] == list(range(1, STEPS + 1))


@each_method
def test_a_full_disk_ends_in_one_error_and_the_run_goes_on_elsewhere(
    package: Package, whole: Any, tmp_path_factory: Any, tmp_path: Path
) -> None:
    reference, _ = uninterrupted(package, whole, tmp_path_factory)
    folder, log = tmp_path / "run", tmp_path / "log"
    assert start(command(package, folder, "--stop-every", "4"), log).wait() == 130
    largest = max(file.stat().st_size for file in newest(folder).iterdir())

    def little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    log.unlink()
    assert start(command(package, folder), log, preexec_fn=little_room).wait() == 3, log.read_text()
    assert "Traceback" not in log.read_text()
    complete(package, folder, log)
    assert outcome(folder) == outcome(reference)


@each_method
def test_a_corrupt_configuration_is_one_error(package: Package, tmp_path: Path) -> None:
    file, log = tmp_path / "config.yaml", tmp_path / "log"
    for content in (b"\xff\xfe\0", b"lr: [1, 2", b"- a\n- b\n", b"lr: fast\nnothing: 1\n"):
        file.write_bytes(content)
        assert start(command(package, tmp_path / "run", "--config", str(file)), log).wait() == 2
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "run").exists()
