from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.mdm_scaling.test_method import TINY, PretrainConformance, batch, method
from transformers import AutoModelForCausalLM

from lm_core.config import build
from lm_core.errors import ConfigError
from lm_core.method import IGNORE
from mdm_scaling import experiments, sweep
from mdm_scaling.config import PretrainConfig
from mdm_scaling.noise import Noise, levels, masks

INDEX = torch.arange(400)


def masked() -> torch.Tensor:
    t = levels("iid", 1, "noise", 0, INDEX, INDEX, 400)
    return masks(Noise(), t, torch.ones(400, 24, dtype=torch.bool), 1, "noise", INDEX)[0]


def step(**options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one batch in training and the gradients."""
    made = method(objective=options.pop("objective", "ar"), **options)
    model = made.build()
    model.train()
    total = sum((loss.total for loss in made.losses(model, batch())), torch.zeros(()))
    total.backward()
    return float(total.detach()), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- left-to-right masking ---


def test_suffixes_have_the_length_of_the_masks_they_replace() -> None:
    before = masked()
    eligible = torch.ones_like(before)
    eligible[:, ::5] = False
    before &= eligible
    after, chosen = experiments.suffixes(before, eligible, 1.0, 3, INDEX)
    assert bool(chosen.all())
    assert torch.equal(after.sum(1), before.sum(1))
    for row, allowed in zip(after, eligible):
        places = row[allowed].tolist()
        assert places == sorted(places)


def test_suffixes_come_at_their_rate_and_leave_the_rest_alone() -> None:
    before = masked()
    after, chosen = experiments.suffixes(before, torch.ones_like(before), 0.25, 3, INDEX)
    assert abs(float(chosen.double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    assert torch.equal(after[~chosen], before[~chosen])
    assert torch.equal(experiments.suffixes(before, torch.ones_like(before), 0.0, 3, INDEX)[0], before)


def test_both_kinds_of_sequences_are_measured_separately() -> None:
    made, given = method(ar_ratio=0.5), batch(size=16)
    model = made.build()
    [loss] = made.losses(model, given)
    suffix, random = (loss.metrics[f"{name}_mask_loss"] for name in ("suffix", "random"))
    assert float(suffix[0] + random[0]) == pytest.approx(float(loss.total.detach()), rel=1e-5)
    assert float(suffix[1] + random[1]) == 16 * 32
    assert 0 < float(suffix[1]) < 16 * 32


# --- token masking ---


def test_hidden_keys_come_at_their_rate() -> None:
    size, index = 16, torch.arange(600)
    place = torch.arange(size)
    earlier = place < place[:, None]
    itself = torch.eye(size, dtype=torch.bool)
    for mode, expected in (("attention", 0.5 * (0.001 + 0.999 / 2)), ("column", 0.5)):
        seen = experiments.seen(mode, size, 0.5, 1e-3, 7, index)[:, 0]  # type: ignore[arg-type]
        assert not bool((seen & ~(earlier | itself)).any())
        assert bool(seen[:, itself].all())
        hidden = 1 - float(seen[:, earlier].double().mean())
        assert abs(hidden - expected) < 0.03, mode


def test_attention_masking_hides_by_query_and_column_masking_by_key() -> None:
    rows = ~experiments.seen("attention", 24, 0.5, 1e-3, 7, torch.arange(8))[:, 0] & torch.ones(24, 24, dtype=torch.bool).tril(-1)
    columns = ~experiments.seen("column", 24, 0.5, 1e-3, 7, torch.arange(8))[:, 0] & torch.ones(24, 24, dtype=torch.bool).tril(-1)
    assert bool(((~rows).all(2)[:, 4:]).any())
    for sample in columns:
        for key in range(23):
            assert len(set(sample[key + 1 :, key].tolist())) == 1


def test_input_masking_replaces_tokens_and_leaves_labels() -> None:
    ids = torch.zeros(400, 50, dtype=torch.long)
    given = experiments.replaced(ids, 0.3, 9, 7, INDEX)
    assert set(given.unique().tolist()) == {0, 9}
    assert abs(float((given == 9).double().mean()) - 0.3) < 0.02


def test_masking_of_attention_changes_what_a_model_sees() -> None:
    plain, _ = step()
    for mode in ("attention", "column", "input"):
        assert step(randmask_ratio=0.7, randmask_mode=mode)[0] != plain


# --- orders ---


def test_orders_are_permutations_and_begin_with_the_identity() -> None:
    for predefined in (False, True):
        table = experiments.orders(8, 40, predefined, 5)
        assert table[0].tolist() == list(range(40))
        assert all(sorted(row) == list(range(40)) for row in table.tolist())
        assert len({tuple(row) for row in table.tolist()}) == 8


def test_predefined_orders_move_away_step_by_step() -> None:
    def inversions(order: list[int]) -> int:
        return sum(a > b for a, b in itertools.combinations(order, 2))

    counts = [inversions(row) for row in experiments.orders(16, 40, True, 5).tolist()]
    assert counts == sorted(counts)
    assert counts[-1] > counts[1] > counts[0] == 0


def test_positions_follow_tokens() -> None:
    tokens = torch.arange(100, 133)[None].repeat(6, 1)
    table = experiments.orders(4, 32, False, 5)
    inputs, labels, positions, of_labels = experiments.reordered(tokens[:, :-1], tokens[:, 1:], table, 5, torch.arange(6))
    assert torch.equal(inputs, 100 + positions)
    assert torch.equal(labels, 100 + of_labels)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert inputs[:, 0].tolist() == [100] * 6
    for row, last in zip(inputs.tolist(), labels[:, -1].tolist()):
        assert sorted([*row, last]) == list(range(100, 133))


def test_a_permuted_sequence_is_no_packed_one() -> None:
    """Every input sees all inputs before it, whatever their positions: a change of the first token reaches the last prediction."""
    made = method(objective="ar", num_order_list=2)
    model = made.build().eval()
    ids = batch().to(torch.device("cpu"))["input_ids"][:1]
    table = experiments.orders(2, 32, False, 5)
    positions = torch.cat([torch.zeros(1, 1, dtype=torch.long), table[1][None, :-1] + 1], dim=1)
    mask = experiments.causal(1, 32, ids.device)
    other = ids.clone()
    other[0, 0] += 1
    last, rows = ids[0, :1], torch.tensor([31])
    losses = [model(given, last, rows, attention_mask=mask, position_ids=positions) for given in (ids, other)]
    assert not torch.equal(losses[0], losses[1])


def told() -> Any:
    """A network whose projection of the target's position is not zero any more."""
    model: Any = method(objective="ar", num_order_list=4, order_target_position="embedding").build().eval()
    with torch.no_grad():
        model.model.model.target_position.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return model


def test_a_model_that_is_told_nothing_yet_is_the_plain_one() -> None:
    plain, changed = step(num_order_list=4), step(num_order_list=4, order_target_position="embedding")
    assert plain[0] == changed[0]
    assert bool(changed[1].pop("model.model.target_position.weight").any())
    assert plain[1].keys() == changed[1].keys()


def test_a_told_model_predicts_another_token_at_another_position_and_the_next_one_by_default() -> None:
    model, ids = told(), batch()["input_ids"][:1]
    positions = torch.arange(32)[None]
    mask = experiments.causal(1, 32, ids.device)

    def losses(**changes: Any) -> torch.Tensor:
        return model(ids, ids.flatten(), attention_mask=mask, position_ids=positions, reduction="none", **changes)

    by_default = losses()
    assert torch.equal(by_default, losses(target_positions=positions + 1))
    moved = positions + 1
    moved[0, 20] = 5
    assert torch.equal(losses(target_positions=moved)[:20], by_default[:20])
    assert not torch.equal(losses(target_positions=moved)[20], by_default[20])


def test_a_told_model_is_read_back_and_writes_alike_with_and_without_a_cache(tmp_path: Path) -> None:
    model, ids = told().model, batch()["input_ids"][:1, :8]
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(read).__name__ == "OrderedForCausalLM"
    assert torch.equal(read(ids).logits, model(ids).logits)
    found = [read.generate(ids, max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=0) for cache in (True, False)]
    assert torch.equal(*found)


# --- neutral values, and what does not go together ---


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("mdm", {"ar_ratio": 0.0}),
        ("ar", {"randmask_ratio": 0.0, "randmask_mode": "column"}),
        ("ar", {"num_order_list": 1}),
        ("ar", {"num_order_list": 1, "use_predefined_order": True}),
    ],
)
def test_neutral_knobs_change_no_bit(objective: str, options: dict[str, Any]) -> None:
    plain, changed = step(objective=objective), step(objective=objective, **options)
    assert plain[0] == changed[0]
    assert all(torch.equal(plain[1][name], changed[1][name]) for name in plain[1])


@pytest.mark.parametrize("options", [{"randmask_ratio": 0.5}, {"randmask_ratio": 0.5, "randmask_mode": "column"}, {"num_order_list": 4}])
def test_evaluations_are_not_perturbed(options: dict[str, Any]) -> None:
    losses = []
    for changes in ({}, options):
        made = method(objective="ar", **changes)
        model = made.build().eval()
        losses.append(sum(float(loss.total.detach()) for loss in made.losses(model, batch())))
    assert losses[0] == losses[1]


def test_every_knob_ignores_how_a_batch_is_split() -> None:
    for objective, options in (("mdm", {"ar_ratio": 0.5}), ("ar", {"randmask_ratio": 0.5}), ("ar", {"num_order_list": 4})):
        made = method(objective=objective, **options)
        model = made.build()
        model.train()
        whole = batch()
        parts = [
            type(whole)({name: tensor[rows] for name, tensor in whole.items()}, index=whole.index[rows], step=0)
            for rows in (slice(0, 1), slice(1, 4))
        ]

        def total(given: Any, made: Any = made, model: Any = model) -> float:
            return sum(float(loss.total.detach()) for loss in made.losses(model, given))

        assert sum(map(total, parts)) == pytest.approx(total(whole), rel=1e-5)
        assert int((whole["labels"] != IGNORE).sum()) == made.targets(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "ar", "ar_ratio": 0.5}, "ar_ratio: 0.5 replaces masks"),
        ({"objective": "mdm", "randmask_ratio": 0.5}, "randmask_ratio: 0.5 perturbs next-token prediction"),
        ({"objective": "mdm", "num_order_list": 2}, "num_order_list: 2 perturbs next-token prediction"),
        ({"objective": "mdm", "order_target_position": "embedding"}, "order_target_position: embedding perturbs next-token prediction"),
        ({"objective": "ar", "num_order_list": 2, "randmask_ratio": 0.5}, "num_order_list: goes with neither"),
        ({"objective": "mdm", "ar_ratio": 1.5}, "ar_ratio"),
    ],
)
def test_knobs_of_the_other_objective_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(PretrainConfig, {**TINY, "budget": "1 steps", **options})


def test_the_grids_are_complete() -> None:
    entries = sweep.grid("experiment", {**TINY, "global_batch_size": 4}, flops=[1e9])
    objectives = [entry["config"]["objective"] for entry in entries]
    assert (objectives.count("mdm"), objectives.count("ar")) == (12, 44)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "changes"),
    [("mdm", {"ar_ratio": 0.5}), ("ar", {"randmask_ratio": 0.3}), ("ar", {"num_order_list": 2, "order_target_position": "embedding"})],
)
def test_experiments_train_and_resume_bit_for_bit(objective: str, changes: dict[str, Any], tmp_path: Path) -> None:
    suite = PretrainConformance()
    suite.objective, suite.changes = objective, changes
    suite.test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path)
