"""Whatever happens to a run, it can go on and ends as if nothing had happened, or it says in one line what is wrong."""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from torch import nn

from lm_core import checkpoint
from lm_core.cli import Command, configured
from lm_core.errors import ResumeRefused
from lm_core.method import Batch, Loss
from lm_core.options import RunConfig
from lm_core.run import run
from lm_core.sinks import read
from tests.core.small import NextToken, cli, small_run
from tests.core.warm import finish, flags, start, wait_for_step

KILLS = 12
TIMES = {"seconds", "speed/tokens_per_second", "memory/gib"}


def outcome(folder: Path) -> tuple[Any, ...]:
    """What a finished run has computed: all records but for times, the checksums of its newest checkpoint, and `final`."""
    newest = checkpoint.latest(folder)
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())
    final = {path.name: path.read_bytes() for path in (folder / "final").iterdir() if path.suffix in (".safetensors", ".json")}
    return records(folder), state["files"], state["data"], final, sorted(path.name for path in folder.iterdir())


def records(folder: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read(folder / "metrics.jsonl")]


def train(folder: Path, **changed: Any) -> Result:
    """A small run by the command, in this process."""
    return CliRunner().invoke(cli, flags(folder, **changed))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps with checkpoints at 4 and 8."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    small_run(folder)
    return folder


@pytest.fixture
def half(whole: Path, tmp_path: Path) -> Path:
    """A copy of it as if it had been stopped at step 4."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for name in ("final", "checkpoints/checkpoint-8"):
        shutil.rmtree(folder / name)
    return folder


# --- killed ---


@pytest.mark.slow
def test_kills_change_nothing(tmp_path: Path) -> None:
    """Half of them come at a random time, half at a random change in the run folder."""
    settings: dict[str, Any] = {"budget": "40 steps", "save_every": "2", "eval_every": "10"}
    log = tmp_path / "log"
    assert finish(start(flags(tmp_path / "whole", **settings), log)) == 0, log.read_text()
    expected = outcome(tmp_path / "whole")
    draw = random.Random(0)
    kills, runs, code = 0, 0, -1
    while kills < KILLS or code != 0:
        folder = tmp_path / f"run{runs}"
        by_time = kills < KILLS and draw.random() < 0.5
        die_at = (folder, draw.randrange(1, 150)) if kills < KILLS and not by_time else None
        before = written(folder)
        child = start(flags(folder, **settings, resume="auto"), log, die_at=die_at)
        if by_time:
            # mostly while it trains, sometimes while it starts
            while draw.random() < 0.999 and child.is_alive() and written(folder) == before:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.3))
            child.kill()
        code = finish(child)
        assert code in (0, 128 + signal.SIGKILL), log.read_text()
        kills += code != 0
        if code == 0:
            assert outcome(folder) == expected
            runs += 1


def written(folder: Path) -> int:
    """When the run logged last."""
    path = folder / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


# --- stopped ---


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_130(tmp_path: Path, number: signal.Signals) -> None:
    settings: dict[str, Any] = {"schedule": "constant", "save_every": "never", "eval_every": "never"}
    folder, log = tmp_path / "run", tmp_path / "log"
    child = start(flags(folder, **settings, budget="100k steps"), log)
    wait_for_step(folder, 3, child)
    assert child.pid is not None
    os.kill(child.pid, number)
    assert finish(child) == 130, log.read_text()
    result = json.loads((folder / "result.json").read_text())
    step = result["progress"]["steps"]
    assert result["reason"] == {"kind": "interrupted", "text": f"{number.name} received"}
    assert f"error: {number.name} received: saved at step {step}; go on with --resume auto" in log.read_text()
    assert checkpoint.latest(folder) == folder / "checkpoints" / f"checkpoint-{step}"
    small_run(folder, **settings, budget=f"{step + 2} steps", resume="auto")
    small_run(tmp_path / "whole", **settings, budget=f"{step + 2} steps")
    assert outcome(folder) == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step_and_both_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings: dict[str, Any] = {"micro_batch_size": 2, "save_every": "never", "eval_every": "never", "schedule": "constant"}
    logs = [tmp_path / "log0", tmp_path / "log1"]

    def both(budget: str) -> list[BaseProcess]:
        words = flags(folder, **settings, budget=budget, resume="auto")
        return [start(words, logs[rank], rank=(rank, 2, tmp_path / f"store {budget}")) for rank in (0, 1)]

    children = both("100k steps")
    wait_for_step(folder, 3, children[0])
    assert children[1].pid is not None
    os.kill(children[1].pid, signal.SIGTERM)
    assert [finish(child) for child in children] == [130, 130], "".join(log.read_text() for log in logs)
    step = json.loads((folder / "result.json").read_text())["progress"]["steps"]
    assert all(f"saved at step {step}" in log.read_text() for log in logs)
    assert checkpoint.latest(folder) == folder / "checkpoints" / f"checkpoint-{step}"
    assert [finish(child) for child in both(f"{step + 2} steps")] == [0, 0], "".join(log.read_text() for log in logs)
    assert json.loads((folder / "result.json").read_text())["progress"]["steps"] == step + 2


@pytest.mark.slow
def test_a_process_whose_neighbour_died_says_so_and_leaves_with_3(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings: dict[str, Any] = {"micro_batch_size": 2, "budget": "100k steps", "eval_every": "never"}
    logs = [tmp_path / "log0", tmp_path / "log1"]
    children = [start(flags(folder, **settings), logs[rank], rank=(rank, 2, tmp_path / "store")) for rank in (0, 1)]
    wait_for_step(folder, 5, children[0])
    children[1].kill()
    assert [finish(child) for child in children] == [3, 137]
    assert logs[0].read_text().splitlines()[-1].startswith("error: num_processes: another process of this run has ended;")
    assert json.loads((folder / "result.json").read_text())["reason"]["kind"] == "failed"
    assert checkpoint.latest(folder) is not None


@pytest.mark.slow
def test_the_kill_file_ends_a_run_after_a_checkpoint(tmp_path: Path) -> None:
    folder, log, file = tmp_path / "run", tmp_path / "log", tmp_path / "stop"
    child = start(flags(folder, budget="100k steps", save_every="never", eval_every="never", kill_file=file), log)
    wait_for_step(folder, 3, child)
    file.touch()
    assert finish(child) == 0, log.read_text()
    result = json.loads((folder / "result.json").read_text())
    assert result["reason"] == {"kind": "killed", "text": f"{file} exists"}
    assert checkpoint.latest(folder) == folder / "checkpoints" / f"checkpoint-{result['progress']['steps']}"
    assert (folder / "final" / "model.safetensors").exists()


# --- disk ---


@pytest.fixture
def full_disk(half: Path, tmp_path: Path) -> Iterator[tuple[Path, int | None]]:
    """The stopped run where its next checkpoint has no room, and a limit on file sizes: on a disk of its own where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    used = sum(path.stat().st_size for path in half.rglob("*"))
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0 or libc.mount(b"none", bytes(disk), b"tmpfs", 0, f"size={used + 300_000}".encode()) != 0:
        yield half, 250_000
        return
    try:
        shutil.copytree(half, disk / "run")
        yield disk / "run", None
    finally:
        assert libc.umount2(bytes(disk), 0) == 0


@pytest.mark.slow
def test_a_full_disk_costs_the_new_checkpoint_and_nothing_else(
    full_disk: tuple[Path, int | None], whole: Path, half: Path, tmp_path: Path
) -> None:
    folder, limit = full_disk
    log = tmp_path / "log"
    assert finish(start(flags(folder, resume="auto"), log, file_limit=limit)) == 3, log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last.startswith(f"error: output_dir: {folder} cannot be written (")
    assert last.endswith("); make room and go on with --resume auto")
    assert json.loads((folder / "result.json").read_text())["reason"]["kind"] == "failed"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-4"]
    roomy = tmp_path / "roomy"
    shutil.copytree(folder, roomy)
    small_run(roomy, resume="auto")
    assert outcome(roomy) == outcome(whole)


def test_a_folder_that_cannot_be_written_is_one_error_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        result = train(folder, model="not/loaded")
        assert result.exit_code == 2
        assert (
            result.stderr == f"error: output_dir: {folder} cannot be written ({tmp_path / 'file'} is not a folder); choose another folder\n"
        )
    # where even root may make no file
    result = train(Path("/proc/run"), model="not/loaded")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: output_dir: /proc/run cannot be written (/proc: ")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


# --- damaged ---


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, bit: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    bit = 4 * len(content) if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_any_flipped_bit_of_a_checkpoint_is_refused_by_the_name_of_its_file(half: Path) -> None:
    folder = half / "checkpoints" / "checkpoint-4"
    draw = random.Random(0)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    assert {"model.safetensors", "optimizer.safetensors", "optimizer.json", "config.json", "state.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        for _ in range(8):
            flip(path, draw.randrange(8 * len(content)))
            checkpoint._verify.cache_clear()
            with pytest.raises(ResumeRefused, match=path.name):
                checkpoint.verified(folder)
            path.write_bytes(content)
    checkpoint._verify.cache_clear()
    assert checkpoint.latest(half) == folder


@pytest.mark.parametrize(("name", "damage"), [("model.safetensors", flip), ("optimizer.safetensors", truncate), ("state.json", flip)])
def test_a_damaged_checkpoint_is_refused_with_4_and_passed_over_by_auto(
    whole: Path, tmp_path: Path, name: str, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    newest = folder / "checkpoints" / "checkpoint-8"
    damage(newest / name)
    result = train(folder, resume=newest)
    assert result.exit_code == 4
    assert f"{newest / name}" in result.stderr
    assert "Traceback" not in result.stderr
    assert train(folder, resume="auto").exit_code == 0
    assert f"{newest / name}" in caplog.text
    assert outcome(folder) == outcome(whole)


def test_a_damaged_line_of_the_log_is_named(half: Path) -> None:
    log = half / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[1][:-5], *lines[2:]]) + "\n")
    result = train(half, resume="auto")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"error: {log}: line 2 is damaged; remove that line")


# --- resumed otherwise ---


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "error: seed: the checkpoint was written with 0, this run asks for 1; keep it, or start a new run\n"),
        ({"max_length": 16}, "error: max_length: the checkpoint was written with 32, this run asks for 16; keep it, or start a new run\n"),
        ({"micro_batch_size": 2}, "error: global batch: the checkpoint was written with 4 samples per step, this run has 2 "),
    ],
)
def test_a_changed_option_is_refused_by_name(half: Path, changed: dict[str, Any], message: str) -> None:
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    result = train(half, resume="auto", **changed)
    assert result.exit_code == 4
    assert message in result.stderr
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before


def test_nothing_to_resume_is_refused_with_4(tmp_path: Path) -> None:
    result = train(tmp_path / "run", resume=tmp_path / "checkpoint-4")
    assert result.exit_code == 4
    assert f"{tmp_path / 'checkpoint-4'} is not a complete checkpoint" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_finished_run_goes_on_when_its_budget_grows(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schedule": "constant", "eval_every": "4"}
    small_run(tmp_path / "long", budget="12 steps", **settings)
    small_run(tmp_path / "short", budget="8 steps", **settings)
    small_run(tmp_path / "short", budget="12 steps", resume="auto", **settings)
    assert outcome(tmp_path / "short") == outcome(tmp_path / "long")


@pytest.mark.parametrize("content", ["budget: [1", "- budget", "\x00\xff", "budget: 3 parsecs", "bugdet: 3 steps"])
def test_a_corrupt_configuration_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="latin-1")
    result = CliRunner().invoke(cli, ["train", "--config", str(path), "--model", "small", "--data", "synthetic:markov"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "run.yaml" in result.stderr or "parsecs" in result.stderr or "bugdet" in result.stderr
    assert "Traceback" not in result.stderr


# --- numbers that are not finite ---


class Poisoned(NextToken):
    """The loss of one step is not a number."""

    step = 5

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        for loss in super().losses(model, batch):
            yield Loss(loss.total * (math.nan if batch.step == self.step else 1.0))


@click.command(cls=Command)
@configured(RunConfig)
def poisoned(config: RunConfig) -> dict[str, Any]:
    return run(config, Poisoned(config))


def test_a_loss_that_is_not_a_number_ends_the_run_with_3(tmp_path: Path) -> None:
    result = CliRunner().invoke(poisoned, flags(tmp_path)[1:])
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1] == "error: loss: nan at sample 20; lower --lr, or go on with --nonfinite drop"
    reason = json.loads((tmp_path / "result.json").read_text())["reason"]
    assert reason == {"kind": "failed", "text": "loss: nan at sample 20; lower --lr, or go on with --nonfinite drop"}
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "checkpoint-4"


def test_a_run_that_met_one_goes_on_without_that_step(tmp_path: Path) -> None:
    drop = ["--nonfinite", "drop"]
    assert CliRunner().invoke(poisoned, [*flags(tmp_path / "whole")[1:], *drop]).exit_code == 0
    progress = json.loads((tmp_path / "whole" / "result.json").read_text())["progress"]
    assert (progress["steps"], progress["skipped"], progress["samples"]) == (8, 1, 32)
    assert CliRunner().invoke(poisoned, flags(tmp_path / "run")[1:]).exit_code == 3
    assert CliRunner().invoke(poisoned, [*flags(tmp_path / "run", resume="auto")[1:], *drop]).exit_code == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("spoil", "precision", "steps"),
    [("not a number", "fp32", 10), ("not a number", "fp16", 10), ("infinite gradient", "fp32", 10), ("infinite gradient", "fp16", 40)],
)
def test_a_run_that_drops_every_step_ends_with_3(
    spoil: str, precision: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(self: NextToken, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        loss = model(**batch)
        # a root of zero adds nothing, with an infinite slope
        yield Loss(loss * math.nan if spoil == "not a number" else loss + (loss - loss.detach()).sqrt())

    monkeypatch.setattr(NextToken, "losses", losses)
    result = train(tmp_path, nonfinite="drop", eval_every="never", precision=precision)
    assert result.exit_code == 3
    assert f"error: nonfinite: {steps} steps in a row were dropped; lower --lr" in result.stderr
