"""Small runs in processes that cost no imports: children of a fork server that has made such a run before.

child = start(flags(tmp_path, budget="99 steps"), log=tmp_path / "log")
os.kill(child.pid, signal.SIGKILL)
child.join()
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_core.sinks import read
from tests.core.small import cli, options

# what Python reports before it changes a folder or opens a file in it
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def flags(folder: Path, **changed: Any) -> list[str]:
    """A small run as a command line."""
    return ["train", *(f"--{name}={value[0] if isinstance(value, list) else value}" for name, value in options(folder, **changed).items())]


def start(
    arguments: Sequence[str], log: Path, *, die_at: tuple[Path, int] | None = None, file_limit: int | None = None,
    rank: tuple[int, int, Path] | None = None,
) -> BaseProcess:  # fmt: skip
    """Run the command; what it prints goes to `log`.

    `die_at` (folder, number): it kills itself just before its number-th change in that folder. `file_limit`: no file of it may
    grow beyond so many bytes. `rank` (number, world, meeting place): it is one of several processes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.core.warm_server"])
    with pytest.MonkeyPatch.context() as patch:
        # the server does not take over sys.path (Python 3.11)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]))
        child = context.Process(target=_child, args=(list(arguments), log, die_at, file_limit, rank))
        child.start()
    return child


def _child(
    arguments: list[str], log: Path, die_at: tuple[Path, int] | None, file_limit: int | None, rank: tuple[int, int, Path] | None
) -> None:
    torch.set_num_threads(1)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if rank is not None:
        number, world, place = rank
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=number, world_size=world)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if die_at is not None:
        _die(*die_at)
    cli.main(arguments)


def _die(folder: Path, number: int) -> None:
    left = number

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal left
        # a tree is removed by names relative to an open folder
        if event in EVENTS and (str(details[0]).startswith(str(folder)) or event in ("os.remove", "os.rmdir")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def finish(child: BaseProcess, seconds: float = 120) -> int:
    """The exit code of `child` once it has ended: 128 + n after signal n, as shells write it."""
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        raise AssertionError(f"still running after {seconds} seconds")
    return child.exitcode if child.exitcode >= 0 else 128 - child.exitcode


def wait_for_step(folder: Path, step: int, child: BaseProcess, seconds: float = 120) -> None:
    """Return when the run in `folder` has logged `step`, or `child` has ended."""
    end = time.monotonic() + seconds
    while child.is_alive() and not any(row["step"] >= step for row in read(folder / "metrics.jsonl")):
        assert time.monotonic() < end, f"no step {step} in {folder} after {seconds} seconds"
        time.sleep(0.01)
