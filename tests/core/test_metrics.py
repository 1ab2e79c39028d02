"""Sums in, means out: over steps, over ranks, and into every sink."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch

from lm_core import dist, sinks
from lm_core.metrics import Metrics
from lm_core.options import OutputOptions
from lm_core.progress import Budget, Progress, Reason, Size
from lm_core.testing import spawn


class Kept(list):
    """A sink that keeps its records."""

    def __call__(self, record):
        self.append(record)


def at(step: int, **changed) -> Progress:
    return Progress(steps=step, samples=4 * step, tokens=100 * step, targets=90 * step, seconds=0.5 * step, flops=1e3 * step, **changed)


def total(value) -> torch.Tensor:
    return torch.tensor(value)


def test_means_weigh_every_target_the_same():
    kept = Kept()
    metrics = Metrics([kept])
    metrics.add("train/kl", total(6.0), 2)
    metrics.add("train/kl", total(3.0), 7)
    metrics.average("train/loss", 4.0, weight=1)
    metrics.average("train/loss", 1.0, weight=3)
    record = metrics.flush(at(2), {"optim/lr": 0.25})
    assert kept == [record]
    assert (record["train/kl"], record["train/loss"], record["optim/lr"]) == (1.0, 1.75, 0.25)


def test_records_carry_their_axes():
    record = Metrics(epoch_samples=16).flush(at(2, skipped=1))
    assert record == {
        "step": 2,
        "samples": 8,
        "tokens": 200,
        "targets": 180,
        "seconds": 1.0,
        "flops": 2e3,
        "skipped": 1,
        "epoch": 0.5,
        "speed/tokens_per_second": 200.0,
    }


def test_an_interval_starts_at_the_last_flush():
    metrics = Metrics()
    metrics.start(at(4))
    metrics.add("train/kl", total(6.0), 2)
    metrics.flush(at(5))
    metrics.add("train/kl", total(1.0), 1)
    metrics.average("train/loss", 3.0)
    record = metrics.flush(Progress(steps=6, tokens=800, seconds=4.0))
    assert (record["train/kl"], record["train/loss"], record["speed/tokens_per_second"]) == (1.0, 3.0, 200.0)
    assert "train/kl" not in metrics.flush(at(7))


def test_a_pair_brings_its_own_count():
    metrics = Metrics()
    metrics.add("train/rare", total([6.0, 3.0]), 1000)
    metrics.add("train/rare", total([0.0, 1.0]))
    metrics.add("train/never", total([0.0, 0.0]), 1000)
    record = metrics.flush(at(1))
    assert record["train/rare"] == 1.5
    assert "train/never" not in record


def _two_ranks() -> tuple:
    rank = dist.rank()
    kept = Kept()
    metrics = Metrics([kept])
    # ten targets in the global batch; this rank's part of the sum
    metrics.add("train/kl", total([3.0, 4.5][rank]), 10)
    metrics.average("train/loss", 2.5, weight=10)
    if rank == 1:
        metrics.add("train/rare", total([6.0, 3.0]), 10)
    first = metrics.flush(at(1))
    metrics.add("train/kl", total(1.0), 4)
    second = metrics.flush(at(2))
    stop = [None, Reason("killed", "a file exists") if rank == 1 else None]
    return first, second, len(kept), [dist.agree(reason) for reason in stop]


@pytest.mark.slow
def test_two_ranks_see_one_record_and_agree():
    (first, second, kept, reasons), others = spawn(_two_ranks)
    assert others == (first, second, 0, reasons)
    assert kept == 2
    assert (first["train/kl"], first["train/loss"], first["train/rare"]) == pytest.approx((0.75, 2.5, 2.0))
    assert second["train/kl"] == 0.5
    assert reasons == [None, Reason("killed", "a file exists")]


def run_console(budget: str, *records: dict) -> list[str]:
    stream = io.StringIO()
    console = sinks.Console(Budget.parse(budget), epoch_samples=400, stream=stream)
    metrics = Metrics([console], epoch_samples=400)
    metrics.start(Progress())
    for step, values in enumerate(records, start=1):
        (metrics.log if any("eval" in name for name in values) else metrics.flush)(at(step), values)
    metrics.close()
    return stream.getvalue().splitlines()


def test_console_prints_one_line_per_record():
    lines = run_console(
        "100k tokens",
        {"train/loss": 2.31444, "optim/lr": 2.7e-4},
        {"eval/docs/loss": 2.5, "eval/docs/standard_error": 0.01, "eval/code/loss": 1.25, "eval/code/standard_error": math.nan},
    )
    assert lines == [
        "step 1  tokens 100/100.0k  loss 2.314  lr 2.7e-4  200 tokens/s  left 0:08:20",
        "step 2  tokens 200/100.0k  eval docs 2.5000 ± 0.0100  eval code 1.2500",
    ]


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        ("1000 steps", "step 1/1000  tokens 100"),
        ("2 epochs", "step 1  epochs 0.01/2  tokens 100"),
        ("1 hour, 1M tokens", "step 1  hours 0.00/1  tokens 100/1.0M"),
    ],
)
def test_console_names_the_limits_of_the_budget(budget, text):
    assert run_console(budget, {"train/loss": 1.0})[0].startswith(text + "  loss 1  ")


def test_console_draws_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = io.StringIO()
    stream.isatty = lambda: True
    console = sinks.Console(Budget.parse("10 steps"), None, stream)
    metrics = Metrics([console])
    metrics.start(Progress())
    metrics.flush(at(5), {"train/loss": 2.5})
    metrics.log(at(5), {"eval/docs/loss": 2.25})
    metrics.close()
    assert "50%" in stream.getvalue()
    assert "step 5/10  tokens 500  loss 2.5  200 tokens/s  left 0:00:02" in stream.getvalue()
    assert "eval docs 2.2500" in stream.getvalue()


def write(path, steps, skipped=0) -> Metrics:
    metrics = Metrics([sinks.JsonLines(path)])
    metrics.start(Progress(steps=steps[0] - 1, skipped=skipped))
    for step in steps:
        metrics.flush(at(step), {"train/loss": 1.0 * step})
    metrics.close()
    return metrics


def test_json_lines_survive_and_are_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    assert [row["train/loss"] for row in sinks.read(path)] == [1.0, 2.0, 3.0]
    assert sinks.read(tmp_path / "missing.jsonl") == []


def test_resume_cuts_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4])
    write(path, [3, 4, 5])
    assert [row["step"] for row in sinks.read(path)] == [1, 2, 3, 4, 5]


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    whole = path.read_bytes()
    for size in range(len(whole.splitlines(keepends=True)[0]), len(whole)):
        path.write_bytes(whole[:size])
        assert [row["step"] for row in sinks.read(path)] == [1]
    write(path, [3])
    assert [row["step"] for row in sinks.read(path)] == [1, 3]


def test_rows_of_skipped_steps_after_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics([sinks.JsonLines(path)])
    metrics.start(Progress())
    metrics.flush(at(1, skipped=1))
    metrics.flush(at(1, skipped=2))
    metrics.close()
    resumed = sinks.JsonLines(path)
    resumed.start(at(1, skipped=1))
    resumed.close()
    assert [row["skipped"] for row in sinks.read(path)] == [1]


def test_any_json_reader_takes_a_loss_that_is_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics([sinks.JsonLines(path)])
    metrics.start(Progress())
    metrics.flush(at(1), {"train/loss": math.nan})
    metrics.close()
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["train/loss"] is None
    assert math.isnan(sinks.read(path)[0]["train/loss"])


@pytest.mark.slow
def test_tensorboard_holds_every_metric(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics([sinks.TensorBoard(tmp_path / "runs")])
    metrics.start(Progress())
    metrics.flush(at(1), {"train/loss": 2.5, "optim/lr": 0.5})
    metrics.log(at(2), {"eval/docs/loss": 1.5})
    metrics.close()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["train/loss"] == [(1, 2.5)]
    assert found["train/loss_on_tokens"] == [(100, 2.5)]
    assert found["eval/docs/loss_on_tokens"] == [(200, 1.5)]
    assert found["progress/flops"] == [(1, 1000.0), (2, 2000.0)]
    assert found["optim/lr"] == [(1, 0.5)]


@pytest.mark.slow
def test_wandb_without_a_key_stays_offline_and_resumes_its_run(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    options = OutputOptions(wandb="online")
    for step in (1, 2):
        metrics = Metrics([sinks.Wandb(tmp_path, options)])
        metrics.start(at(step - 1))
        metrics.flush(at(step), {"train/loss": 2.5})
        metrics.close()
    runs = [folder.name for folder in (tmp_path / "wandb").glob("offline-run-*")]
    assert len({name.rpartition("-")[2] for name in runs}) == 1
    assert "wandb: no key found" in caplog.text


def test_a_method_brings_its_own_sink(tmp_path):
    config = SimpleNamespace(tensorboard=False, wandb="off")
    kept = Kept()
    metrics = Metrics.open(tmp_path, config, Budget.parse("10 steps"), None, SimpleNamespace(sinks=lambda folder: [kept]))
    metrics.start(Progress())
    record = metrics.flush(Progress().after(Size(tokens=5), seconds=1.0), {"train/loss": 1.0})
    metrics.close()
    assert kept == sinks.read(tmp_path / "metrics.jsonl") == [record]
