"""Learning-rate shapes: end points, continuity, and the closed forms of the papers."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_core.errors import ConfigError
from lm_core.progress import Budget, Progress, Size
from lm_core.schedule import SHAPES, factor, learning_rate

FALLING = ["linear", "cosine", "exp"]


def options(**changed):
    return SimpleNamespace(**{"lr": 2.0, "schedule": "cosine", "warmup": 0, "cooldown": 0, "min_lr_ratio": 0.0} | changed)


def rates(steps: int, budget: str | None = None, shape=None, **changed) -> list[float]:
    limit = Budget.parse(budget or f"{steps} steps")
    size = Size(samples=2, tokens=64, targets=60)
    progress, found = Progress(), []
    for _ in range(steps):
        found.append(learning_rate(options(**changed), limit, progress, size, epoch_samples=10, shape=shape))
        progress = progress.after(size)
    return found


@pytest.mark.parametrize("shape", FALLING)
@given(steps=st.integers(2, 60), warmup=st.sampled_from([0, 0.25]), floor=st.sampled_from([0.01, 0.1, 0.5]))
def test_first_update_learns_and_last_has_exactly_the_final_rate(shape, steps, warmup, floor):
    found = rates(steps, schedule=shape, warmup=warmup, min_lr_ratio=floor)
    assert found[0] > 0
    assert found[-1] == 2.0 * floor


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_warm_up_is_linear_and_reaches_the_peak(shape):
    found = rates(100, schedule=shape, warmup=10, min_lr_ratio=0.1)
    assert found[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(found) == found[9] == 2.0


@pytest.mark.parametrize(
    ("budget", "warmup"), [("20 steps", 5), ("40 samples", 10), ("1280 tokens", 320), ("1200 targets", 300), ("4 epochs", 1)]
)
def test_every_unit_gives_the_same_rates(budget, warmup):
    assert rates(20, budget, warmup=warmup) == pytest.approx(rates(20, "20 steps", warmup=0.25))


def test_closed_forms():
    at = 0.3
    floor = 0.1
    assert SHAPES["linear"](at, floor, 0) == pytest.approx(1 - 0.9 * at)
    assert SHAPES["cosine"](at, floor, 0) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * at)))
    assert SHAPES["exp"](at, floor, 0) == pytest.approx(0.1**0.3)
    assert SHAPES["constant"](at, floor, 0) == 1


def test_inverse_square_root_is_sqrt_of_warmup_over_steps():
    found = rates(100, schedule="inverse-sqrt", warmup=4, min_lr_ratio=0.3)
    assert found[3:] == pytest.approx([2.0 * max(0.3, math.sqrt(4 / step)) for step in range(4, 101)])


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_cool_down_is_linear_from_the_shape_to_the_final_rate(shape):
    plain = rates(100, schedule=shape, warmup=10, min_lr_ratio=0.1)
    cooled = rates(100, schedule=shape, warmup=10, min_lr_ratio=0.1, cooldown=20)
    assert cooled[:80] == plain[:80]
    slope = (plain[79] - 0.2) / 20
    assert cooled[79:] == pytest.approx([plain[79] - slope * step for step in range(21)])
    assert cooled[-1] == 0.2


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    warmup=st.floats(0.01, 0.5),
    cooldown=st.floats(0, 0.49),
    floor=st.floats(0.01, 1),
    x=st.floats(0, 1),
)
def test_factor_is_continuous_and_between_zero_and_one(shape, warmup, cooldown, floor, x):
    def at(x):
        return factor(x, SHAPES[shape], warmup=warmup, cooldown=cooldown, floor=floor)

    assert 0 <= at(x) <= 1 + 1e-12
    assert abs(at(min(1, x + 1e-9)) - at(x)) < 1e-5


def test_a_package_may_bring_its_own_shape():
    clipped = rates(10, min_lr_ratio=0.25, shape=lambda at, floor, warmup: max(floor, 1 - at))
    assert clipped == pytest.approx([2.0 * max(0.25, 1 - step / 10) for step in range(1, 11)])


def test_the_rate_follows_the_limit_that_is_nearest_to_its_end():
    budget = Budget.parse("100 steps, 640 tokens")
    late = learning_rate(options(schedule="linear"), budget, Progress(steps=1, tokens=512), Size(tokens=64))
    assert late == pytest.approx(2.0 * (1 - 0.9))


def test_a_budget_overshot_keeps_the_final_rate():
    assert learning_rate(options(min_lr_ratio=0.1), Budget.parse("100 tokens"), Progress(tokens=90), Size(tokens=64)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"warmup": 60, "cooldown": 60}, "warmup: 60 and a cool-down of 60 do not fit"),
        ({"warmup": 200}, "warmup: 200"),
        ({"schedule": "exp", "warmup": 10}, "min_lr_ratio: 0 is never reached"),
        ({"schedule": "inverse-sqrt"}, "warmup: 0"),
    ],
)
def test_impossible_schedules_are_refused_by_name(changed, message):
    with pytest.raises(ConfigError, match=message):
        learning_rate(options(**changed), Budget.parse("100 steps"), Progress(), Size())
