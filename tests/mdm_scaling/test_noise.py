from __future__ import annotations

import itertools
import math

import pytest
import torch

from lm_core import counter
from mdm_scaling.noise import Noise, at, lengths, levels, masks, unit, words

ALL = torch.ones(64, 40, dtype=torch.bool)
INDEX = torch.arange(64)


def test_draws_are_those_of_the_counter() -> None:
    assert torch.equal(words(7, "noise", INDEX, 0, 10), counter.bits(7, "noise", INDEX, 10))


def test_single_draws_are_those_of_their_sample() -> None:
    element = torch.arange(64) % 11
    expected = words(7, "sampling", INDEX, 2**31, 12).gather(1, element[:, None])[:, 0]
    assert torch.equal(at(7, "sampling", INDEX, element, 2**31), expected)


def test_level_draws_stand_beyond_those_of_positions() -> None:
    expected = counter.philox((5, 0, 2**31, counter.STREAMS["noise"]), counter.halves(7))
    assert words(7, "noise", torch.tensor([5]), 2**31, 4)[0].tolist() == list(expected)


def test_masked_iff_the_draw_is_below_p() -> None:
    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    masked, weight = masks(Noise(eps=0.1), t, ALL, 3, "noise", INDEX)
    p = 0.1 + 0.9 * t
    assert torch.equal(masked, counter.uniform(3, "noise", INDEX, 40) < p.float()[:, None])
    torch.testing.assert_close(weight.double(), 1 / p, rtol=1e-6, atol=0)


def test_frequency_of_masked_tokens_is_p() -> None:
    index = torch.arange(400)
    masked, _ = masks(
        Noise(eps=1e-3), torch.full((400,), 0.3, dtype=torch.float64), torch.ones(400, 100, dtype=torch.bool), 1, "noise", index
    )
    p, n = 1e-3 + 0.999 * 0.3, masked.numel()
    assert abs(float(masked.double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_a_mask_depends_on_its_sample_alone() -> None:
    t = levels("iid", 5, "noise", 0, INDEX, INDEX, 64)
    whole, _ = masks(Noise(), t, ALL, 5, "noise", INDEX)
    part, _ = masks(Noise(), t[10:20], ALL[10:20], 5, "noise", INDEX[10:20])
    assert torch.equal(part, whole[10:20])
    other, _ = masks(Noise(), t, ALL, 5, "noise", INDEX + 2**33)
    assert not torch.equal(other, whole)


def test_ineligible_tokens_are_never_masked() -> None:
    eligible = ALL.clone()
    eligible[:, ::2] = False
    for noise in (Noise(), Noise(mode="fixed-count")):
        masked, _ = masks(noise, torch.full((64,), 0.9, dtype=torch.float64), eligible, 5, "noise", INDEX)
        assert not bool((masked & ~eligible).any())


@pytest.mark.parametrize("size", [1, 8, 256])
def test_stratified_levels_fill_every_stratum_once(size: int) -> None:
    slots = torch.arange(size)
    t = levels("stratified", 1, "noise", 9, slots, slots + 9 * size, size)
    assert sorted((t * size).long().tolist()) == list(range(size))


def test_shifted_levels_have_equal_distances() -> None:
    slots = torch.arange(16)
    t = levels("shift", 1, "noise", 9, slots, slots, 16).sort().values
    torch.testing.assert_close(t.diff(), torch.full((15,), 1 / 16, dtype=torch.float64))


def test_levels_change_from_step_to_step() -> None:
    slots = torch.arange(16)
    for how in ("stratified", "shift", "iid"):
        assert not torch.equal(levels(how, 1, "noise", 0, slots, slots, 16), levels(how, 1, "noise", 1, slots, slots + 16, 16))


def test_fixed_count_masks_exactly_k() -> None:
    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    masked, weight = masks(Noise(mode="fixed-count"), t, ALL, 3, "noise", INDEX)
    k = torch.clamp(torch.ceil(t * 40), min=1)
    assert masked.sum(1).tolist() == k.tolist()
    torch.testing.assert_close(weight.double(), 40 / k)


def test_fixed_count_is_uniform_over_subsets() -> None:
    index = torch.arange(3000)
    masked, _ = masks(
        Noise(mode="fixed-count"), torch.full((3000,), 0.5, dtype=torch.float64), torch.ones(3000, 4, dtype=torch.bool), 2, "noise", index
    )
    counts = dict.fromkeys(itertools.combinations(range(4), 2), 0)
    for row in masked:
        counts[tuple(row.nonzero()[:, 0].tolist())] += 1
    expected = 3000 / len(counts)
    # 0.999 quantile of chi-square with 5 degrees of freedom
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 20.5


def test_uniform_weights_and_clipping() -> None:
    t = torch.full((64,), 0.01, dtype=torch.float64)
    assert bool((masks(Noise(weight="uniform"), t, ALL, 1, "noise", INDEX)[1] == 1).all())
    assert float(masks(Noise(max_weight=5.0), t, ALL, 1, "noise", INDEX)[1].max()) == 5


def test_lengths_are_cut_at_the_given_rate() -> None:
    index = torch.arange(4000)
    assert lengths(0.0, 1, "noise", index, 32).unique().tolist() == [32]
    cut = lengths(1.0, 1, "noise", index, 32)
    assert sorted(cut.unique().tolist()) == list(range(1, 33))
    assert abs(float(cut.double().mean()) - 16.5) < 4 * 9.3 / math.sqrt(4000)
    some = lengths(0.25, 1, "noise", index, 1000)
    assert abs(float((some < 1000).double().mean()) - 0.25) < 0.03


def test_units_are_24_bits() -> None:
    assert unit(torch.tensor([0, 2**32 - 1])).tolist() == [0.0, 1 - 2.0**-24]
