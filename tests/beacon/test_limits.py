from __future__ import annotations

from typing import Any

import pytest
import torch

from beacon.config import BeaconConfig
from beacon.errors import CapacityError
from lm_core.errors import ConfigError
from tests.beacon.small import beacon_model, ids

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize(("ratio", "stride", "sinks"), [(2, 8, 0), (4, 8, 2), (2, 4, 1), (8, 8, 1)])
def test_exactly_the_capacity_is_read(ratio: int, stride: int, sinks: int) -> None:
    reader = beacon_model(torch.float32, base={"max_position_embeddings": 30}, stride=stride, ratio=[ratio], sink_size=sinks)
    most = reader.beacon.capacity(ratio, 30)
    assert reader.compress(ids(1, most)).lengths()[0]["seen"] == most
    with pytest.raises(CapacityError, match=rf"on_capacity: {most + 1} tokens need \d+ positions, the model has 30") as caught:
        reader.compress(ids(1, most + 1))
    assert caught.value.code == 3
    cache = reader.compress(ids(1, most))
    with pytest.raises(CapacityError):
        cache.append([1])


def test_capacity_can_be_passed_with_a_warning_or_by_dropping() -> None:
    for choice in ("warn", "evict"):
        reader = beacon_model(base={"max_position_embeddings": 30}, ratio=[2], on_capacity=choice)
        assert reader.compress(ids(1, 200)).lengths()[0]["seen"] == 200


@pytest.mark.parametrize("stride", [8, 4])
def test_a_budget_bounds_memory_for_ever(stride: int) -> None:
    reader = beacon_model(ratio=[2], stride=stride, sink_size=2, memory_budget=14, on_budget="evict")
    cache, held = reader.compress(ids(1, 8)), []
    for step in range(200):
        cache.append(ids(1, stride, seed=step)[0].tolist())
        held.append(cache.nbytes)
        assert cache.lengths()[0]["sink"] + cache.lengths()[0]["memory"] <= 14
    limit = 2 * 3 * 2 * 8 * 8 * (14 + 8 + 4)
    assert max(held) <= limit
    assert len(set(held[20:])) == 1


def test_what_stays_after_an_eviction_sits_where_it_would_have_been_written() -> None:
    # the first layer's beacon keys differ by their rotation only
    text = ids(1, 60)
    bounded = beacon_model(ratio=[2], sink_size=0, memory_budget=12, on_budget="evict").compress(text)
    free = beacon_model(ratio=[2], sink_size=0).compress(text)
    size = bounded.lengths()[0]["memory"]
    assert size == 12 < free.lengths()[0]["memory"]
    torch.testing.assert_close(bounded.memory[0][0], free.memory[0][0][:, :, :size], **CLOSE)
    # values are not rotated: they are those of the newest entries
    first = [layer[1] for layer in (bounded.memory[0], free.memory[0])]
    torch.testing.assert_close(first[0], first[1][:, :, -size:], **CLOSE)


@pytest.mark.parametrize("options", [{"memory_budget": 12, "on_budget": "evict"}, {"on_capacity": "evict"}])
def test_evicting_streams_equal_one_shot_for_any_splitting(options: dict[str, Any]) -> None:
    reader = beacon_model(ratio=[2], sink_size=1, base={"max_position_embeddings": 30}, **options)
    rows, mask = ids(2, 71), torch.ones(2, 71, dtype=torch.long)
    mask[1, :13] = 0
    whole = reader(rows, attention_mask=mask)
    parallel = reader(rows, attention_mask=mask, engine="parallel")
    torch.testing.assert_close(parallel.logits, whole.logits, **CLOSE)
    cache, logits, at = None, [], 0
    for size in (20, 1, 1, 9, 40):
        out = reader(rows[:, at : at + size], attention_mask=mask[:, at : at + size], past_key_values=cache)
        cache, at = out.past_key_values, at + size
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **CLOSE)


def test_a_budget_stops_or_adapts() -> None:
    with pytest.raises(CapacityError, match="memory_budget: 32 tokens need 16 memory entries, the budget is 12"):
        beacon_model(ratio=[2, 4, 8], memory_budget=12, inference_ratio_mix="adapt-0").compress(ids(1, 60))
    reader = beacon_model(ratio=[2, 4, 8], memory_budget=16, on_budget="adapt", inference_ratio_mix="adapt-0")
    assert reader.compress(ids(1, 60)).cursors[0].ratios == [4] * 7
    assert reader.compress(ids(1, 20), expected_length=120).cursors[0].ratios == [8] * 2
    with pytest.raises(ConfigError, match=r"memory_budget: no ratio of \[2, 4, 8\] fits 300 tokens into 16"):
        reader.compress(ids(1, 20), expected_length=300)
    with pytest.raises(ConfigError, match="memory_budget: 3 does not hold the sinks and one compaction; use at least 4"):
        BeaconConfig(window=8, stride=8, ratio=[2], memory_budget=3)


def test_training_never_stops_for_positions() -> None:
    reader = beacon_model(base={"max_position_embeddings": 20}, ratio=[2], memory_budget=4).train()
    assert reader(ids(1, 100), ratios=[2]).logits.shape == (1, 100, 61)
