"""Counting, budgets, intervals and stop rules."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_core.errors import ConfigError
from lm_core.progress import Budget, Every, LossBelow, Progress, Reason, Signals, Size, any_of, kill_file

STEP = Size(samples=4, tokens=256, targets=250)


def run(steps: int, size: Size = STEP, seconds: float = 1.0) -> Progress:
    progress = Progress()
    for _ in range(steps):
        progress = progress.after(size, seconds=seconds, flops=10.0)
    return progress


def test_progress_adds_up():
    assert run(3) == Progress(steps=3, samples=12, tokens=768, targets=750, seconds=3.0, flops=30.0)


def test_a_skipped_step_takes_time_but_moves_no_schedule():
    before = run(2)
    after = before.after(STEP, skipped=True, seconds=1.0, flops=10.0)
    budget = Budget.parse("10 steps, 10k tokens, 10k samples, 10k targets")
    assert budget.shares(after) == budget.shares(before)
    assert (after.steps, after.skipped, after.seconds, after.flops) == (2, 1, 3.0, 30.0)


def test_progress_survives_json():
    progress = run(3, seconds=0.1)
    assert Progress.from_dict(json.loads(json.dumps(progress.to_dict()))) == progress


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("100M tokens", {"tokens": 100_000_000}),
        ("1 step", {"steps": 1}),
        ("2 hours, 500 Steps", {"hours": 2, "steps": 500}),
        ("  1.5B   tokens ,3epochs", {"tokens": 1_500_000_000, "epochs": 3}),
        ("200*10^9 targets", {"targets": 200 * 10**9}),
        ("0.5 epochs", {"epochs": 0.5}),
        ("10_000 samples", {"samples": 10_000}),
    ],
)
def test_budgets_are_read(text, limits):
    assert dict(Budget.parse(text).limits) == limits


def test_the_unit_of_a_budget_is_that_of_its_first_limit():
    assert Budget.parse("2 hours, 500 steps").unit == "hours"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1000",
        "tokens",
        "100 parsecs",
        "many tokens",
        "0 steps",
        "-1 steps",
        "1.5 steps",
        "1 step, 2 steps",
        "1 step 2 hours",
        "nan steps",
    ],
)
def test_bad_budgets_are_refused_naming_the_field(text):
    with pytest.raises(ConfigError, match=r"^budget: "):
        Budget.parse(text)


def test_epochs_need_data_of_known_length():
    budget = Budget.parse("2 epochs")
    assert budget.fraction(run(5), None, epoch_samples=20) == 0.5
    with pytest.raises(ConfigError, match="budget: a limit in epochs"):
        budget.fraction(run(5))


def test_hours_are_seconds_of_the_run():
    assert Budget.parse("0.5 hours").fraction(Progress(seconds=450)) == 0.25


@given(steps=st.integers(1, 200), tokens=st.integers(1, 10_000))
def test_fraction_counts_the_step_about_to_run(steps, tokens):
    budget = Budget({"steps": steps, "tokens": steps * tokens})
    size = Size(tokens=tokens)
    assert budget.fraction(Progress(), size) == pytest.approx(1 / steps)
    assert budget.fraction(Progress(steps=steps - 1, tokens=(steps - 1) * tokens), size) == 1.0


@given(limit=st.integers(1, 5000), tokens=st.integers(1, 300))
def test_a_run_ends_at_the_first_step_that_reaches_its_budget(limit, tokens):
    stop = Budget({"tokens": limit}).rule()
    progress = Progress()
    while not stop(progress):
        progress = progress.after(Size(tokens=tokens))
    assert progress.steps == math.ceil(limit / tokens)


def test_the_limit_that_ends_a_run_is_named():
    reason = Budget.parse("100 steps, 512 tokens").rule()(run(2))
    assert reason == Reason("budget", "budget of 512 tokens reached")


def times(every: str, steps: int, budget: str, epoch_samples: int | None = None) -> list[int]:
    interval, limit = Every.parse(every), Budget.parse(budget)
    return [step for step in range(1, steps + 1) if interval.due(run(step - 1), run(step), limit, epoch_samples)]


@pytest.mark.parametrize(
    ("every", "budget", "expected"),
    [
        ("3", "10 steps", [3, 6, 9]),
        ("0.1", "10 steps", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ("0.49", "10 steps", [5, 10]),
        ("0.25", "1280 tokens, 100 steps", [2, 3, 4, 5]),
        ("epoch", "100 steps", [3, 5, 8, 10]),
        ("never", "10 steps", []),
    ],
)
def test_intervals_recur(every, budget, expected):
    assert times(every, 10, budget, epoch_samples=10) == expected


@given(fraction=st.integers(1, 50).map(lambda n: n / 100), steps=st.integers(1, 120))
def test_a_fraction_recurs_as_often_as_it_fits_into_the_budget(fraction, steps):
    found = times(str(fraction), steps, f"{steps} steps")
    expected = sorted({math.ceil(round(k * fraction * steps, 6)) for k in range(1, int(1 / fraction + 1e-9) + 1)})
    assert found == expected


def test_a_skipped_step_makes_nothing_due_twice():
    at_ten = run(10)
    assert not Every(steps=10).due(at_ten, at_ten.after(STEP, skipped=True), Budget({"steps": 100}))


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "often", "", "epochs and more"])
def test_bad_intervals_are_refused_naming_the_option(text):
    with pytest.raises(ConfigError, match=r"^save_every: "):
        Every.parse(text, "save_every")


def test_intervals_in_epochs_need_data_of_known_length():
    with pytest.raises(ConfigError, match="known length"):
        Every.parse("epoch").due(run(1), run(2), Budget({"steps": 10}))


def test_loss_below_waits_for_its_window_and_its_first_step():
    rule = LossBelow(1.0, window=3, after=5)
    stopped = []
    for step, loss in enumerate([0.5, 0.5, 0.5, 0.5, 3.0, 0.5, 0.5, 0.4], start=1):
        rule.add(loss)
        stopped.append(rule(run(step)) is not None)
    assert stopped == [False] * 7 + [True]


def test_loss_below_never_stops_on_nan():
    rule = LossBelow(1.0, window=1)
    rule.add(math.nan)
    assert rule(run(1)) is None


def test_loss_below_resumes():
    rule = LossBelow(0.0, window=3)
    for loss in (3.0, -1.0, -0.5):
        rule.add(loss)
    resumed = LossBelow(0.0, window=3)
    resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    for loss in (-0.2, -0.1):
        rule.add(loss)
        resumed.add(loss)
        assert rule(run(1)) == resumed(run(1))
    assert rule(run(1)) is not None


def test_kill_file(tmp_path):
    rule = kill_file(tmp_path / "stop", every_seconds=0)
    assert rule(run(1)) is None
    (tmp_path / "stop").touch()
    assert rule(run(1)).kind == "killed"


def test_any_of_gives_the_first_reason():
    never, second = (lambda progress: None), Budget({"steps": 1}).rule()
    assert any_of(never, never)(run(1)) is None
    assert any_of(never, second)(run(1)).kind == "budget"


def test_ranks_agree_on_one_reason_each_step():
    """Two ranks in two threads; only rank 1 hears the signal, at its own step 3."""
    reasons, barrier, stopped = [None, None], threading.Barrier(2), [None, None]

    def rank(number: int) -> None:
        def agree(reason):
            reasons[number] = reason
            barrier.wait()
            agreed = next((found for found in reasons if found), None)
            barrier.wait()
            return agreed

        def heard(progress):
            return Reason("interrupted", "SIGTERM received") if number == 1 and progress.steps == 3 else None

        stop, progress = any_of(heard, Budget({"steps": 9}).rule(), agree=agree), Progress()
        while not (reason := stop(progress)):
            progress = progress.after(STEP)
        stopped[number] = (progress.steps, reason.kind)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert stopped == [(3, "interrupted"), (3, "interrupted")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_noticed_and_handlers_put_back(number):
    before = signal.getsignal(number)
    with Signals() as stop:
        assert stop(run(1)) is None
        os.kill(os.getpid(), number)
        assert stop(run(1)) == Reason("interrupted", f"{number.name} received")
    assert signal.getsignal(number) is before


def test_a_second_interrupt_aborts_at_once_unless_a_launcher_repeats_the_first():
    with Signals(grace_seconds=0.2) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(run(1)).kind == "interrupted"
        time.sleep(0.2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_forked_worker_outlives_an_interrupt_and_ends_quietly_on_terminate():
    with Signals() as stop:
        worker = os.fork()
        if worker == 0:
            signal.pause()
            signal.pause()
            os._exit(3)
        time.sleep(0.2)
        os.kill(worker, signal.SIGINT)
        time.sleep(0.2)
        os.kill(worker, signal.SIGTERM)
        _, status = os.waitpid(worker, 0)
        assert stop(run(1)) is None
    assert os.waitstatus_to_exitcode(status) == 0


def test_torch_is_not_imported():
    command = "import sys, lm_core.progress, lm_core.schedule; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)
