from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_core.data import Data
from lm_core.data.loader import Loader, eval_batches
from lm_core.data.pack import BestFit, OneDocument, Stream
from lm_core.errors import ResumeRefused
from lm_core.method import Batch


@pytest.fixture(scope="module")
def data(make_source) -> Data:
    rows = {
        "a": Stream(make_source([5, 9, 4, 7, 6, 30]), 8, shuffle=True, number=0),
        "b": Stream(make_source([40, 3, 11]), 8, shuffle=True, number=1),
        "c": Stream(make_source([16]), 8, shuffle=True, number=2),
    }
    return Data(train=rows, valid=rows, weights={"a": 5, "b": 2, "c": 1})


def seen(batch: Batch) -> list[tuple[int, int, tuple[int, ...]]]:
    """(sample number, source, tokens) of each row."""
    rows = batch["input_ids"].tolist()
    return [(int(n), int(source), tuple(row)) for n, source, row in zip(batch.index, batch["source"], rows)]


def steps(loaders: list[Loader], count: int) -> list[list[tuple[int, int, tuple[int, ...]]]]:
    """What all ranks together see in each step, by sample number."""
    return [sorted(row for loader in loaders for batch in next(loader) for row in seen(batch)) for _ in range(count)]


def ranks(data: Data, world: int, micro_batch: int, accumulate: int, **options: Any) -> list[Loader]:
    return [Loader(data, micro_batch=micro_batch, accumulate=accumulate, rank=rank, world=world, **options) for rank in range(world)]


SPLITS = [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 2, 2), (4, 1, 2), (8, 1, 1)]


@pytest.mark.parametrize("draw", ["deficit", "keyed"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_split_of_the_global_batch_sees_the_same_samples(data: Data, draw, shuffle: bool) -> None:
    data = Data(train=data.train, valid=data.valid, weights=data.weights, draw=draw)
    found = [steps(ranks(data, *split, seed=5, shuffle=shuffle), 40) for split in SPLITS]
    assert all(other == found[0] for other in found)
    assert [row[0] for step in found[0] for row in step] == list(range(320))


@pytest.mark.parametrize("draw", ["deficit", "keyed"])
def test_a_source_that_ends_is_read_again_ends_the_run_or_leaves_its_part(data: Data, draw, caplog: pytest.LogCaptureFixture) -> None:
    lengths = {name: len(rows) for name, rows in data.train.items()}
    found = {}
    for policy in ("repeat", "stop", "renormalize"):
        loaders = ranks(replace(data, draw=draw, on_exhausted=policy), 2, 1, 1)
        rows: list[Any] = []
        while len(rows) < 40 and [loader.before_step() for loader in loaders] == [None, None]:
            rows += steps(loaders, 1)[0]
        found[policy] = Counter(source for _, source, _ in rows), len({row[1:] for row in rows}), len(rows)
    assert found["repeat"][2] == 40
    assert "source c: pass 2 over its samples begins" in caplog.text
    # nothing twice, and in the end nothing but what does not fill a step
    for policy in ("stop", "renormalize"):
        counts, different, read = found[policy]
        assert different == read
        assert all(counts[number] <= length for number, length in enumerate(lengths.values()))
    assert found["stop"][2] < found["renormalize"][2]
    assert found["renormalize"][2] >= sum(lengths.values()) - len(lengths)


def test_sample_n_is_on_rank_n_mod_world(data: Data) -> None:
    for rank, loader in enumerate(ranks(data, 4, 1, 2)):
        for _ in range(5):
            batches = next(loader)
            assert [batch.index.tolist() for batch in batches] == [[n] for n in (batches[0].index.item(), batches[0].index.item() + 4)]
            assert batches[0].index.item() % 4 == rank


@pytest.mark.parametrize("workers", [0, 1])
def test_a_ramp_cuts_the_first_steps_short_and_nothing_else(data: Data, workers: int) -> None:
    whole = [row for step in steps(ranks(data, 2, 2, 2), 4) for row in step]
    loaders = ranks(data, 2, 2, 2, ramp=[1, 1, 2, 1], num_workers=workers)
    found = steps(loaders, 3)
    state = loaders[0].state_dict()
    found += steps(loaders, 2)
    assert [len(step) for step in found] == [4, 4, 8, 4, 8]
    assert [row for step in found for row in step] == whole[:28]
    resumed = ranks(data, 4, 1, 2, ramp=[1, 1, 2, 1])
    for loader in resumed:
        loader.load_state_dict(state)
    assert resumed[0].sample == 16
    assert steps(resumed, 2) == found[3:]


def test_batches_carry_their_step_and_have_equal_shapes(data: Data) -> None:
    loader = Loader(data, micro_batch=3, accumulate=2)
    for step in range(4):
        batches = next(loader)
        assert [batch.step for batch in batches] == [step, step]
        assert [batch["labels"].shape for batch in batches] == [(3, 8), (3, 8)]


@given(at=st.integers(0, 60), first=st.sampled_from(SPLITS), second=st.sampled_from(SPLITS), moved=st.booleans())
@settings(max_examples=25)
def test_resumed_at_any_step_and_world_size_equals_uninterrupted(data: Data, at: int, first, second, moved: bool) -> None:
    weights = {"a": 1, "b": 7, "c": 2}
    straight = ranks(data, 1, 8, 1, seed=2)
    steps(straight, at // 2)
    if moved:
        straight[0].set_weights(weights)
    expected = steps(straight, at - at // 2 + 6)[-6:]

    before = ranks(data, *first, seed=2)
    steps(before, at // 2)
    if moved:
        for loader in before:
            loader.set_weights(weights)
    steps(before, at - at // 2)
    states = [json.dumps(loader.state_dict()) for loader in before]
    assert len(set(states)) == 1
    after = ranks(data, *second, seed=2)
    for loader in after:
        loader.load_state_dict(json.loads(states[0]))
    assert after[0].sample == at * 8
    assert steps(after, 6) == expected


def test_a_pass_over_all_sources_gives_every_sample_once(data: Data, make_source) -> None:
    rows = {name: BestFit(make_source(lengths), 8) for name, lengths in {"a": [5, 9, 4], "b": [8, 8, 8, 3]}.items()}
    loader = Loader(Data(train=rows, valid={}, weights={name: len(some) for name, some in rows.items()}), micro_batch=1)
    size = loader.epoch_samples
    assert size == sum(map(len, rows.values()))
    passes = [Counter(row[1:] for step in steps([loader], size) for row in step) for _ in range(2)]
    assert passes[0] == passes[1]
    assert set(passes[0].values()) == {1}


def test_passes_differ_in_order_and_seeds_differ(data: Data) -> None:
    one = Data(train={"a": data.train["a"]}, valid={}, weights={"a": 1})
    size = len(data.train["a"])
    loader = Loader(one, micro_batch=size)
    orders = [tuple(map(tuple, next(loader)[0]["input_ids"].tolist())) for _ in range(3)]
    orders += [tuple(map(tuple, next(Loader(one, micro_batch=size, seed=1))[0]["input_ids"].tolist()))]
    assert len(set(orders)) == 4
    assert "source" not in next(loader)[0]


def test_without_shuffling_samples_come_in_order(make_source) -> None:
    rows = {"a": Stream(make_source([5, 9, 4, 30]), 8)}
    loader = Loader(Data(train=rows, valid={}, weights={"a": 1}), micro_batch=3, shuffle=False)
    assert [token for _ in range(2) for row in next(loader)[0]["input_ids"].tolist() for token in row] == list(range(48))


def test_moved_weights_hold_from_the_next_step(data: Data) -> None:
    loader = Loader(data, micro_batch=10)
    next(loader)
    loader.set_weights({"a": 0, "b": 0, "c": 1})
    assert loader.weights == {"a": 0, "b": 0, "c": 1}
    assert {row[1] for step in steps([loader], 3) for row in step} == {2}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_also_after_weights_moved_and_a_resume(data: Data, workers: int) -> None:
    alone, helped = (Loader(data, micro_batch=2, accumulate=2, num_workers=number) for number in (0, workers))
    assert steps([helped], 6) == steps([alone], 6)
    for loader in (alone, helped):
        loader.set_weights({"a": 1, "b": 5, "c": 3})
    assert steps([helped], 3) == steps([alone], 3)
    assert helped.state_dict() == alone.state_dict()
    state, expected = alone.state_dict(), steps([alone], 3)
    helped.load_state_dict(state)
    assert steps([helped], 3) == expected


def test_a_checkpoint_of_other_samples_is_refused_by_name(data: Data, make_source) -> None:
    state = json.loads(json.dumps(Loader(data, micro_batch=8).state_dict()))
    for field, loader in {
        "global_batch: 4": Loader(data, micro_batch=4),
        "seed: 1": Loader(data, micro_batch=8, seed=1),
        "shuffle: False": Loader(data, micro_batch=8, shuffle=False),
        r"data: sources \['a'\]": Loader(Data(train={"a": data.train["a"]}, valid={}, weights={"a": 1}), micro_batch=8),
        "data: the documents": Loader(
            Data(train={**data.train, "c": Stream(make_source([17]), 8)}, valid={}, weights=data.weights), micro_batch=8
        ),
    }.items():
        with pytest.raises(ResumeRefused, match=field):
            loader.load_state_dict(state)


@pytest.mark.parametrize("draw", ["deficit", "keyed"])
def test_another_batch_goes_on_at_the_next_sample(data: Data, draw) -> None:
    whole = [row for step in steps(ranks(replace(data, draw=draw), 1, 8, 1), 9) for row in step]
    state: dict[str, Any] = {}
    for size, first, last in ((8, 0, 3), (4, 3, 7), (2, 7, 10)):
        following = ranks(replace(data, draw=draw), 1, size, 1)
        if first:
            following[0].load_state_dict(state, allow={"global_batch"})
        begin = following[0].sample
        found = [row for step in steps(following, last - first) for row in step]
        assert found == whole[begin : begin + len(found)]
        # and again from a checkpoint made since, without leave
        again = ranks(replace(data, draw=draw), 1, size, 1)
        state = json.loads(json.dumps(following[0].state_dict()))
        again[0].load_state_dict(state)
        assert (again[0].sample, again[0].state_dict()) == (following[0].sample, state)
    assert state["mix"]["sample"] == 24 + 16 + 6


@pytest.mark.parametrize("draw", ["deficit", "keyed"])
@pytest.mark.parametrize("workers", [0, 1])
def test_sources_that_stay_go_on_where_they_were_and_others_begin(data: Data, make_source, draw, workers: int) -> None:
    before = ranks(replace(data, draw=draw), 1, 1, 1, seed=3)[0]
    taken = before._mix.taken(12)
    read = [row[1:] for step in steps([before], 12) for row in step]
    before.set_weights({"a": 4, "b": 3, "c": 1})
    state = json.loads(json.dumps(before.state_dict()))
    new = Stream(make_source([8] * 9), 8, shuffle=True, number=0)
    # as options that name another list would build them
    rows = {"new": new, "c": Stream(data.train["c"].source, 8, shuffle=True, number=1), "a": Stream(data.train["a"].source, 8, shuffle=True, number=2)}  # type: ignore[attr-defined]  # fmt: skip
    changed = Data(train=rows, valid={}, weights={"new": 1, "c": 1, "a": 2}, draw=draw)
    after = Loader(changed, micro_batch=1, seed=3, num_workers=workers)
    next(after)  # workers have their copies before the resume
    with pytest.raises(ResumeRefused, match=r"data: sources \['new', 'c', 'a'\], but the checkpoint was made with \['a', 'b', 'c'\]"):
        after.load_state_dict(state)
    after.load_state_dict(state, allow={"sources"})
    # 1/2 and 1/8 of before stay, beside 1/4 as given
    assert after.weights == pytest.approx({"new": 2 / 7, "c": 1 / 7, "a": 4 / 7})
    assert after._mix.taken(12) == [0, taken[2], taken[0]]
    found = [row[1:] for step in steps([after], 40) for row in step]
    for place, name in ((0, "a"), (2, "c")):
        length = len(data.train[name])
        here = [tokens for source, tokens in read if source == place]
        there = [tokens for source, tokens in found if source == [*rows].index(name)]
        left = -len(here) % length
        assert len(there) >= left
        # the pass that had begun ends with what it had not read
        begun = here[len(here) - len(here) % length :] + there[:left]
        assert len(set(begun)) == len(begun) == (length if len(here) % length else 0)
    assert len({tokens for source, tokens in found if source == 0}) == min(9, sum(source == 0 for source, _ in found))
    again = Loader(changed, micro_batch=1, seed=3)
    again.load_state_dict(json.loads(json.dumps(after.state_dict())))
    assert steps([again], 20) == steps([after], 20)


def test_given_shares_hold_where_they_may_differ(data: Data) -> None:
    before = Loader(data, micro_batch=4)
    steps([before], 3)
    state = before.state_dict()
    for weights, allow, expected in (
        ({"a": 0, "b": 0, "c": 1}, {"seed"}, before.weights),
        ({"a": 0, "b": 0, "c": 1}, {"weights"}, {"a": 0, "b": 0, "c": 1}),
    ):
        after = Loader(replace(data, weights=weights), micro_batch=4)
        after.load_state_dict(state, allow=allow)
        assert after.weights == expected
    same = Loader(data, micro_batch=4)
    same.load_state_dict(state, allow={"weights", "sources", "seed", "global_batch"})
    assert same.state_dict() == state
    assert steps([same], 20) == steps([before], 20)


def test_samples_of_another_length_go_on_behind_the_same_part_of_the_pass(make_source) -> None:
    def loader(size: int, seed: int = 0) -> Loader:
        return Loader(
            Data(train={"a": Stream(make_source([100]), size)}, valid={}, weights={"a": 1}), micro_batch=1, shuffle=False, seed=seed
        )

    before = loader(10)
    for _ in range(13):
        next(before)
    for size, first in ((10, 30), (20, 40), (5, 30), (7, 35)):
        after = loader(size, seed=1)
        after.load_state_dict(before.state_dict(), allow={"sources", "seed"})
        (batch,) = next(after)
        assert (batch.index.tolist(), int(batch["input_ids"][0, 0])) == ([13], first)


def test_rows_of_a_package_need_only_the_protocol() -> None:
    class Numbers:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([k]), "labels": torch.tensor([k])}

        def collate(self, rows: Any) -> dict[str, torch.Tensor]:
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    loader = Loader(Data(train={"n": Numbers()}, valid={}, weights={"n": 1}), micro_batch=3)
    assert sorted(next(loader)[0]["input_ids"].flatten().tolist()) == [0, 1, 2]
    assert sorted(next(loader)[0]["input_ids"].flatten().tolist()) == [0, 1, 2]
    assert [batch["labels"].flatten().tolist() for batch in eval_batches(Numbers(), micro_batch=2, tokens=2)] == [[0, 1]]


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 60))
def test_evaluation_sees_the_same_rows_for_every_world_size(make_source, lengths, micro_batch: int, world: int, tokens: int) -> None:
    rows = OneDocument(make_source(lengths), 9)
    batches = [list(eval_batches(rows, micro_batch=micro_batch, rank=rank, world=world, tokens=tokens)) for rank in range(world)]
    assert len({len(some) for some in batches}) == 1
    assert {len(batch.index) for some in batches for batch in some} == {micro_batch}
    index = sorted(int(n) for some in batches for batch in some for n in batch.index if n >= 0)
    # the closed form: up to the first row with which the budget is reached
    reached = [n for n in range(len(lengths)) if tokens and sum(lengths[: n + 1]) >= tokens]
    assert index == list(range(reached[0] + 1 if reached else len(lengths)))
    for rank, some in enumerate(batches):
        for batch in some:
            for n, labels, ids in zip(batch.index.tolist(), batch["labels"], batch["input_ids"]):
                if n < 0:
                    assert (labels == -100).all()
                else:
                    assert n % world == rank
                    assert (labels != -100).sum() == lengths[n] - 1
                    assert ids[: lengths[n]].tolist() == rows[n]["input_ids"].tolist()
