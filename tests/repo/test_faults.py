"""Every method by its real command under faults: killed at random moments, one of two ranks killed, files damaged, a disk that is full,
losses that are no numbers, a clock that jumps.

`nox -s faults` runs it and writes docs/faults.md; `tests/core/test_faults.py` goes through every moment of a small run.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lm_core.sinks import read
from tests.repo.tree import ROOT, Package, methods

pytestmark = pytest.mark.faults
each_method = pytest.mark.parametrize("package", methods(), ids=lambda package: package.name)
STEPS, KILLS, SIGNALS = 12, 5, 2

# A clock of the day that goes back by an hour, and then forward by a day, at each question.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *found) {
    static int (*real)(clockid_t, struct timespec *);
    static int questions;
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, found);
    if (clock == CLOCK_REALTIME) found->tv_sec += questions++ % 2 ? 86400 : -3600;
    return code;
}
"""


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


def survived(package: Package, fault: str, count: int = 1) -> None:
    """Note for docs/faults.md, where nox says so, that a method survived a fault."""
    if log := os.environ.get("FAULTS_LOG"):
        with open(log, "a") as file:
            file.write(json.dumps({"method": package.name, "fault": fault, "count": count}) + "\n")


def outcome(folder: Path) -> tuple[list[Any], dict[str, bytes]]:
    """Each step's loss, and the bytes of the weights."""
    return logged(folder), {file.name: file.read_bytes() for file in sorted((folder / "final").glob("*.safetensors"))}


def logged(folder: Path) -> list[Any]:
    """Each step and its loss."""
    return [(record["step"], record["train/loss"]) for record in read(folder / "metrics.jsonl") if "train/loss" in record]


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
    survived(package, "kill -9 at a random moment", KILLS)


@each_method
def test_a_damaged_checkpoint_is_passed_over(package: Package, whole: Any, tmp_path_factory: Any, tmp_path: Path) -> None:
    reference, _ = uninterrupted(package, whole, tmp_path_factory)
    folder, log = tmp_path / "run", tmp_path / "log"
    # some methods keep one by default
    kept = ["--keep-checkpoints", "2", "--keep-optimizer", "2"]
    assert start(command(package, folder, "--stop-every", "6", *kept), log).wait() == 130
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
        assert start(command(package, folder, *kept, *more), log).wait() == code, log.read_text()
        assert f"{file.name}" in log.read_text()
        assert "passed over" in log.read_text()
    assert outcome(folder) == outcome(reference)
    survived(package, "checkpoint cut short or with a flipped bit", 2)


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
    survived(package, "kill -9 of one of two processes")


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
    survived(package, "disk full during a save")


@each_method
def test_a_corrupt_configuration_is_one_error(package: Package, tmp_path: Path) -> None:
    file, log = tmp_path / "config.yaml", tmp_path / "log"
    for content in (b"\xff\xfe\0", b"lr: [1, 2", b"- a\n- b\n", b"lr: fast\nnothing: 1\n"):
        file.write_bytes(content)
        assert start(command(package, tmp_path / "run", "--config", str(file)), log).wait() == 2
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "run").exists()
    survived(package, "corrupt configuration", 4)


@each_method
def test_termination_saves_and_the_run_goes_on(package: Package, whole: Any, tmp_path_factory: Any, tmp_path: Path) -> None:
    reference, _ = uninterrupted(package, whole, tmp_path_factory)
    folder, log = tmp_path / "run", tmp_path / "log"
    for _ in range(SIGNALS):
        before = len(logged(folder))
        child = start(command(package, folder), log)
        while child.poll() is None and len(logged(folder)) == before:
            time.sleep(0.01)
        child.terminate()
        assert child.wait() == 130, log.read_text()
    complete(package, folder, log)
    assert outcome(folder) == outcome(reference)
    survived(package, "SIGTERM", SIGNALS)


@each_method
def test_numbers_that_are_none_end_the_run_and_the_last_checkpoint_is_good(
    package: Package, whole: Any, tmp_path_factory: Any, tmp_path: Path
) -> None:
    reference, _ = uninterrupted(package, whole, tmp_path_factory)
    folder, log = tmp_path / "run", tmp_path / "log"
    assert start(command(package, folder, "--stop-every", "4"), log).wait() == 130
    log.unlink()
    # an update of this size leaves weights whose products overflow
    wild = command(package, folder, "--lr", "1e30", "--schedule", "constant", "--warmup", "0", "--save-every", "never")
    assert start(wild, log).wait() == 3, log.read_text()
    assert "Traceback" not in log.read_text()
    assert "lower --lr" in log.read_text()
    complete(package, folder, log)
    assert outcome(folder) == outcome(reference)
    survived(package, "loss or gradient not a number")


@each_method
def test_a_clock_that_jumps_changes_nothing(package: Package, whole: Any, tmp_path_factory: Any, tmp_path: Path) -> None:
    reference, _ = uninterrupted(package, whole, tmp_path_factory)
    folder, log, library = tmp_path / "run", tmp_path / "log", tmp_path / "clock.so"
    (tmp_path / "clock.c").write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "clock.c"), "-ldl"], check=True)
    jumping = {**os.environ, "LD_PRELOAD": str(library)}
    times = subprocess.run(
        ["python", "-c", "import time; print(*(time.time() for _ in range(4)))"], env=jumping, capture_output=True, text=True
    )
    seen = [float(word) for word in times.stdout.split()]
    assert any(later < earlier for earlier, later in pairwise(seen)), "the clock did not jump"
    assert start(command(package, folder, "--stop-every", "6"), log, env=jumping).wait() == 130, log.read_text()
    assert start(command(package, folder), log, env=jumping).wait() == 0, log.read_text()
    assert outcome(folder) == outcome(reference)
    assert 0 < json.loads((folder / "result.json").read_text())["progress"]["seconds"] < 3000
    survived(package, "clock that jumps")


@each_method
def test_damaged_data_are_one_error(package: Package, tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    environment = {**os.environ, "LM_CORE_CACHE": str(cache)}
    assert start(command(package, tmp_path / "made", "--budget", "1 steps"), log, env=environment).wait() == 0, log.read_text()
    tokens = [file for file in cache.rglob("*.bin") if (file.parent / "meta.json").exists()]
    assert tokens, "nothing was written to shards"
    for number, damage in enumerate(("cut", "flip", "meta")):
        kept = {file: file.read_bytes() for file in [*tokens, *(file.parent / "meta.json" for file in tokens)]}
        for file in tokens:
            if damage == "cut":
                file.write_bytes(kept[file][:-1])
            elif damage == "flip":
                # the high bit of every id
                file.write_bytes(bytes(byte | 0x80 if at % 2 else byte for at, byte in enumerate(kept[file])))
            else:
                (file.parent / "meta.json").write_bytes(kept[file.parent / "meta.json"][:9])
        log.unlink()
        assert start(command(package, tmp_path / f"run{number}"), log, env=environment).wait() == 2, log.read_text()
        assert "Traceback" not in log.read_text()
        assert str(cache) in log.read_text()
        for file, content in kept.items():
            file.write_bytes(content)
    complete(package, tmp_path / "after", log)
    survived(package, "token shards cut short, with flipped bits, without their description", 3)


@each_method
def test_a_folder_that_cannot_be_written_is_one_error(package: Package, tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "run", Path("/proc/run")):
        assert start(command(package, place), log).wait() == 2, log.read_text()
    assert "Traceback" not in log.read_text()
    survived(package, "folder that cannot be written", 2)
