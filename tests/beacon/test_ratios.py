from __future__ import annotations

from collections import Counter

import pytest

from beacon.config import BeaconConfig
from beacon.ratios import choose, training_ratios
from lm_core import counter
from lm_core.errors import ConfigError


def config(**values: object) -> BeaconConfig:
    return BeaconConfig(**{"window": 8, "stride": 8, "ratio": [2, 4, 8], **values})  # type: ignore[arg-type]


def drawn(cfg: BeaconConfig, step: int, length: int = 200) -> list[int]:
    return training_ratios(cfg, 7, step, length, 4096)


def test_step_random_follows_the_published_draws() -> None:
    u = counter.uniform(7, "ratio", 3, 60)
    assert drawn(config(), 3)[:20] == [[2, 4, 8][int(u[2 + 2 * i] * 3)] for i in range(20)]


def test_a_longer_row_of_the_same_step_shares_its_beginning() -> None:
    assert drawn(config(), 5, 400)[:24] == drawn(config(), 5, 200)


def test_repetition_is_weight_and_only_divisors_are_drawn() -> None:
    count = Counter(ratio for step in range(60) for ratio in drawn(config(ratio=[2, 2, 2, 4, 3, 64]), step))
    assert set(count) == {2, 4}
    assert count[2] / count.total() == pytest.approx(0.75, abs=0.03)


def test_instance_and_mixed_choices() -> None:
    assert all(len(set(drawn(config(ratio_mix="instance-random"), step))) == 1 for step in range(10))
    whole = [len(set(drawn(config(ratio_mix="mix-random"), step))) == 1 for step in range(60)]
    assert 15 < sum(whole) < 45
    assert drawn(config(ratio_mix="sequence"), 0)[:5] == [2, 4, 8, 2, 4]


def test_at_most_one_raw_window_in_training_and_never_the_last() -> None:
    for step in range(50):
        ratios = drawn(config(ratio=[0, 0, 2, 4]), step, 60)
        assert ratios.count(0) <= 1
        assert ratios[-1] > 0
    with pytest.raises(ConfigError, match="ratio: training needs a ratio above 0"):
        drawn(config(ratio=[0]), 0)


@pytest.mark.parametrize(("length", "expected"), [(10, 2), (72, 2), (74, 4), (136, 4), (138, 8), (9999, 8)])
def test_adapt_takes_the_smallest_ratio_that_fits(length: int, expected: int) -> None:
    # P = 40, w = s = 8: (P - w) r + w = 72, 136, 264; cap(r) = 8 floor(32 / (8 / r)) + 7 = 71, 135, 263
    assert choose(config(), "adapt-0", None, length, 0, 40)(0) == expected
    assert choose(config(), "adapt-0", None, 10, length - 1, 40)(0) == expected


def test_random_choices_need_a_seed_outside_training() -> None:
    with pytest.raises(ConfigError, match="inference_ratio_mix: step-random draws at random; give a seed"):
        choose(config(), "step-random", None, 10, 10, 40)
    assert choose(config(ratio=[4]), "step-random", None, 10, 10, 40)(3) == 4
