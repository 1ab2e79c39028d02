from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_core.config import build
from lm_core.errors import ConfigError, InputError
from lm_core.method import IGNORE, Batch
from lm_core.options import RunConfig
from lm_core.run import run
from lm_core.testing import Conformance
from mdm_scaling.config import PretrainConfig, settled
from mdm_scaling.evaluate import corpus_loss
from mdm_scaling.method import Pretrain
from mdm_scaling.options import EvalConfig
from mdm_scaling.train import pretrain

TINY: dict[str, Any] = {
    "model": "tiny",
    "tokenizer": "bytes",
    "data": ["synthetic:markov"],
    "max_length": 32,
    "lr": 5e-3,
    "warmup": 0.1,
    "num_workers": 0,
    # dropout draws by place in the micro-batch, so with it a step depends on how a batch is split
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


class PretrainConformance(Conformance):
    objective = "mdm"
    changes: dict[str, Any] = {}

    def configure(self, **options: Any) -> PretrainConfig:
        return build(PretrainConfig, {**TINY, "objective": self.objective, **self.changes, **options})

    def method(self, config: RunConfig) -> Pretrain:
        assert isinstance(config, PretrainConfig)
        return Pretrain(config)


@pytest.mark.slow
class TestMdm(PretrainConformance):
    objective = "mdm"


@pytest.mark.slow
class TestAr(PretrainConformance):
    objective = "ar"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_resume_is_bitwise_with_dropout(objective: str, tmp_path: Path) -> None:
    suite = PretrainConformance()
    suite.objective, suite.changes = objective, {"attention_dropout": 0.2, "hidden_dropout": 0.2, "eval_every": "never"}
    suite.test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path)


def test_small_updates_first_see_the_same_samples_in_any_split_and_after_a_restart(tmp_path: Path) -> None:
    shared = {
        **TINY, "objective": "mdm", "global_batch_size": 8, "rampup_batch_size": [2, 2, 12], "train_samples": 31, "micro_batch_size": 2,
        "eval_every": "never", "log_every": 1, "save_every": "3", "precision": "fp32", "device": "cpu", "tensorboard": False,
    }  # fmt: skip
    curves = {}
    for name, changes in (("whole", {}), ("split", {"micro_batch_size": 1}), ("resumed", {"resume": "auto"})):
        folder = tmp_path / name
        if name == "resumed":
            shutil.copytree(tmp_path / "whole", folder)
            shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
        config = settled(build(PretrainConfig, {**shared, **changes, "output_dir": folder}))
        run(config, Pretrain(config))
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [(record["samples"], record["train/loss"]) for record in records]
    # the sizes grow 2, 2, 4, 6 over 12 samples; another 8 would go beyond the 31
    assert [samples for samples, _ in curves["whole"]] == [2, 4, 8, 14, 22, 30]
    assert curves["resumed"] == curves["whole"]
    assert [loss for _, loss in curves["split"]] == pytest.approx([loss for _, loss in curves["whole"]], rel=1e-5)


@pytest.mark.parametrize(
    ("ramp", "micro", "message"),
    [
        ([8, 2, 12], 2, "8,2,12 does not grow from 8 to the 8"),
        ([2, 4, 12], 2, "in steps of 4"),
        ([2, 2, 12], 4, "2 is not a multiple of 4"),
    ],
)
def test_a_ramp_that_does_not_fit_is_refused(ramp: list[int], micro: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settled(
            build(
                PretrainConfig,
                {
                    **TINY,
                    "objective": "ar",
                    "global_batch_size": 8,
                    "rampup_batch_size": ramp,
                    "micro_batch_size": micro,
                    "budget": "9 steps",
                },
            )
        )


def method(**options: Any) -> Pretrain:
    config = build(PretrainConfig, {**TINY, "objective": "mdm", "budget": "8 steps", "micro_batch_size": 4, **options})
    made = Pretrain(config)
    made.vocabulary = 259
    return made


def batch(first: int = 0, size: int = 4, step: int = 0) -> Batch:
    tokens = torch.randint(256, (size, 32), generator=torch.Generator().manual_seed(first))
    return Batch({"input_ids": tokens, "labels": tokens}, index=torch.arange(first, first + size), step=step)


def total(made: Pretrain, model: Any, given: Batch) -> float:
    return sum(float(loss.total.detach()) for loss in made.losses(model, given))


@pytest.mark.parametrize(
    "options", [{}, {"mask_mode": "fixed-count"}, {"loss_weight": "uniform"}, {"t_sampling": "shift"}, {"variable_length_ratio": 0.5}]
)
def test_every_kind_of_noise_ignores_how_a_batch_is_split(options: dict[str, Any]) -> None:
    made = method(**options)
    model = made.build()
    whole = batch()
    parts = [
        Batch({name: tensor[rows] for name, tensor in whole.items()}, index=whole.index[rows], step=0)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(total(made, model, part) for part in parts) == pytest.approx(total(made, model, whole), rel=1e-5)
    assert sum(made.targets(part) for part in parts) == made.targets(whole)


def test_targets_are_eligible_tokens_or_masked_ones() -> None:
    given = batch()
    assert method().targets(given) == 4 * 32
    made = method(loss_weight="uniform")
    masked = next(iter(made.masks(given, given["labels"] != IGNORE)))[0]
    assert made.targets(given) == int(masked.sum()) < 4 * 32


def test_less_noise_in_the_beginning() -> None:
    shares = []
    for options in ({}, {"low_noise_start": True, "low_noise_ratio": 0.25, "low_noise_iter": 5}):
        made = method(**options)
        shares.append(
            [
                sum(int(next(iter(made.masks(batch(4 * s, step=s), torch.ones(4, 32, dtype=torch.bool))))[0].sum()) for s in steps)
                for steps in (range(5), range(5, 10))
            ]
        )
    assert shares[1][0] < 0.5 * shares[0][0]
    assert shares[1][1] == shares[0][1]


def test_cut_sequences_are_neither_seen_nor_predicted() -> None:
    made, given = method(variable_length_ratio=1.0), batch(size=16)
    _, labels, attention = made.cut(given)
    assert attention is not None
    assert torch.equal(labels == IGNORE, attention == 0)
    assert made.tokens(given) == made.targets(given) == int(attention.sum()) < 16 * 32


def test_end_tokens_may_be_left_unpredicted(tmp_path: Path) -> None:
    tokenizer = method().tokenizer()
    for mask, found in ((False, True), (True, False)):
        rows = method(eod_mask_loss=mask, output_dir=tmp_path, max_length=512).data(tokenizer).train["train"]
        assert any(tokenizer.eos_token_id in rows[k]["labels"] for k in range(8)) == found


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_documents_that_are_kept_apart_score_as_if_they_were_alone(objective: str) -> None:
    made = method(objective=objective, reset_attention_mask=True, reset_position_ids=True)
    made.end = 7
    model = made.build().eval()
    ids = batch(size=1)["input_ids"]
    ids[ids == 7] = 8
    ids[0, [9, 20]] = 7
    whole = model(ids, ids.flatten(), reduction="none", **made.seen(ids, None))
    alone = [model(part[None], part, reduction="none") for part in (ids[0, :10], ids[0, 10:21], ids[0, 21:])]
    torch.testing.assert_close(whole, torch.cat(alone))
    # positions alone: everything before (or around) is seen as ever, at other places
    made = method(objective=objective, reset_position_ids=True)
    made.end = 7
    seen = made.seen(ids, None)
    assert seen["position_ids"][0].tolist() == [*range(10), *range(11), *range(11)]
    assert int(seen["attention_mask"].sum()) == (32 * 33 // 2 if objective == "ar" else 32 * 32)


def test_ar_predicts_the_next_token_and_mdm_the_same_one() -> None:
    tokenizer = method().tokenizer()
    ar, mdm = (method(objective=objective).data(tokenizer).train["train"][5] for objective in ("ar", "mdm"))
    assert ar["input_ids"].tolist() == mdm["input_ids"].tolist() == mdm["labels"].tolist()
    assert ar["labels"].tolist()[:-1] == ar["input_ids"].tolist()[1:]


def test_tokens_and_orders_are_kept_where_the_options_say(tmp_path: Path) -> None:
    made = method(data_cache_dir=tmp_path)
    made.data(made.tokenizer())
    assert {path.name for path in tmp_path.iterdir()} >= {"mdm-order"}
    assert len(list(tmp_path.rglob("samples.npy"))) == 1


def test_epochs_repeat_the_first_unique_tokens() -> None:
    tokenizer = method().tokenizer()
    rows = (
        method(budget="", unique_tokens=640, epochs=4, global_batch_size=4, packing="fixed", epoch_shuffle="per-epoch")
        .data(tokenizer)
        .train["train"]
    )
    assert len(rows) == 19
    seen = [sorted(tuple(rows.epoch(epoch)[k]["input_ids"]) for k in range(19)) for epoch in range(3)]  # type: ignore[attr-defined]
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0])) == 19


def test_evaluations_repeat_their_noise_and_report_a_bound(tmp_path: Path) -> None:
    suite = PretrainConformance()
    suite.changes = {"lr": 1e-12, "num_mc": 2}
    suite.run(tmp_path, budget="2 steps", eval_every="1", save_every="never")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    held = [record for record in records if "eval/markov/loss" in record]
    assert held[0]["eval/markov/loss"] == pytest.approx(held[1]["eval/markov/loss"], rel=1e-5)
    assert held[0]["eval/markov/mdm_bound[stratified,mc=2]"] == pytest.approx(held[0]["eval/markov/loss"])
    assert 0 < records[1]["train/mask_ratio"] < 1


def test_a_result_says_what_a_fit_needs_and_the_model_can_be_scored(tmp_path: Path) -> None:
    config = build(
        PretrainConfig,
        {
            **TINY,
            "objective": "mdm",
            "train_samples": 50,
            "micro_batch_size": 4,
            "global_batch_size": 8,
            "eval_every": "3",
            "eval_iters": 2,
            "precision": "fp32",
            "tensorboard": False,
            "output_dir": tmp_path / "run",
        },
    )
    result = pretrain(settled(config))
    assert result["status"] == "done"
    assert result["progress"]["samples"] == 48
    scaling = result["scaling"]
    assert (scaling["N"], scaling["D"], scaling["C"]) == (99264, 48 * 32, 6 * 99264 * 48 * 32)
    assert scaling["best_loss"] <= scaling["final_loss"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")).__name__ == "MdmForMaskedLM"
    scored = corpus_loss(EvalConfig(checkpoint=str(tmp_path / "run"), data=["synthetic:markov"], max_length=32, limit=8, num_mc=2))
    assert scored["objective"] == "mdm"
    with pytest.raises(InputError, match="is a model of mdm, not ar"):
        corpus_loss(EvalConfig(checkpoint=str(tmp_path / "run"), data=["synthetic:markov"], max_length=32, objective="ar"))
    assert 0 < scored["sources"]["markov"]["loss"] < 8


def test_a_kill_file_that_exists_ends_a_run_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    config = build(
        PretrainConfig, {**TINY, "objective": "ar", "budget": "8 steps", "kill_file": tmp_path / "stop", "output_dir": tmp_path / "run"}
    )
    assert pretrain(config)["status"] == "killed"
    assert not (tmp_path / "run").exists()


def test_scoring_agrees_with_stock_transformers(tmp_path: Path) -> None:
    config = build(
        PretrainConfig,
        {
            **TINY,
            "objective": "ar",
            "budget": "2 steps",
            "output_dir": tmp_path / "run",
            "precision": "fp32",
            "tensorboard": False,
            "eval_tokens": 64,
        },
    )
    run(config, Pretrain(config))
    scored = corpus_loss(EvalConfig(checkpoint=str(tmp_path / "run"), data=["synthetic:markov"], max_length=32, limit=4))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    from mdm_scaling.data.corpus import open_held_out
    from mdm_scaling.evaluate import windows

    part = open_held_out(["synthetic:markov"], Pretrain(config).tokenizer(), text_column="text")[0]
    rows = windows(part, 32, 4)
    with torch.no_grad():
        logits = model(input_ids=rows[:, :-1]).logits[..., :259]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert scored["sources"]["markov"]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert not math.isnan(scored["sources"]["markov"]["standard_error"])


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_real_model_goes_on_training(objective: str, tmp_path: Path) -> None:
    config = build(
        PretrainConfig,
        {
            "objective": objective, "model": "smollm2-135m", "data": ["builtin:python-docs"], "split": "900,100,0", "max_length": 128, "micro_batch_size": 2,
            "global_batch_size": 2, "train_samples": 4, "eval_every": "2", "eval_iters": 1, "save_every": "never", "tensorboard": False, "num_workers": 0,
            "warmup": 0.5, "output_dir": tmp_path / "run", "attention_dropout": 0.0, "hidden_dropout": 0.0,
        },
    )  # fmt: skip
    result = pretrain(settled(config))
    assert result["status"] == "done"
    assert result["scaling"]["N"] == 134_515_008
    assert result["scaling"]["best_loss"] < {"ar": 3.5, "mdm": 12}[objective]
