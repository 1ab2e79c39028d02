"""Classification: data as the files say, scores as scipy has them, models that learn, adapters and heads that are saved."""

from __future__ import annotations

import json
import random
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from lm_core.config import build
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError
from lm_core.models import load_classifier, lora, using_peft
from lm_core.run import run
from lowrank_opt import examples, scores
from lowrank_opt.checks import refuse_unused
from lowrank_opt.cli import cli
from lowrank_opt.config import TrainConfig
from lowrank_opt.glue import summary
from lowrank_opt.memory import model_of
from lowrank_opt.method import adapter_config, method_for
from lowrank_opt.models import HUB_MODELS, PRESETS
from lowrank_opt.optimizer_options import LEARNING_RATES, OPTIMIZERS
from lowrank_opt.resolve import resolved


def write(path: Path, count: int, pair: bool = False, seed: int = 0) -> Path:
    """Words of letters of the first half of the alphabet (label 0) or of the second (label 1)."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            label = draw.randrange(2)
            words = [
                "".join(draw.choices("abcdefghijklm" if side == label else "nopqrstuvwxyz", k=draw.randint(3, 9))) for side in (0, label)
            ]
            row = {"sentence1": words[1], "sentence2": words[0]} if pair else {"sentence": words[1]}
            file.write(json.dumps({**row, "label": int(words[1][0] > "m")}) + "\n")
    return path


def make(folder: Path, **options: Any) -> TrainConfig:
    values = {
        "mode": "finetuning",
        "task": "sst2",
        "optimizer": "baseline",
        "model": "roberta_test",
        "tokenizer": "bytes",
        "data": [str(folder / "train.jsonl")],
        "max_length": 24,
        "micro_batch_size": 16,
        "precision": "fp32",
        "lr": 3e-3,
        "schedule": "constant",
        "num_epochs": 3,
        "tensorboard": False,
        "output_dir": folder / "run",
        **options,
    }
    return resolved(build(TrainConfig, values))


OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"galore": {"rank": 8, "update_proj_gap": 20}} for name in ("galore", "qgalore", "fira")},
    "galore8bit": {"galore": {"rank": 8, "update_proj_gap": 20, "min_8bit_size": 64}},
    "apollo": {"apollo": {"apollo_rank": 8}},
    "ldadam": {"galore": {"rank": 8}},
    "lora": {"lora": {"lora_dropout": 0.0}},
    **{name: {"galore": {"rank": 4}, "lora": {"lora_dropout": 0.0}} for name in ("lora+galore", "lora+galore8bit")},
}
LEARN = [
    *(("roberta_test", optimizer) for optimizer in typing.get_args(OPTIMIZERS)),
    ("gpt2_test", "galore"),
    ("gpt2_test", "lora"),
    ("llama_test", "apollo-mini"),
    ("llama_test", "lora+galore8bit"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "optimizer"), LEARN)
def test_a_simple_task_is_learnt_and_the_folder_holds_the_classifier(model: str, optimizer: str, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 640)
    config = make(tmp_path, model=model, optimizer=optimizer, lr=LEARNING_RATES[optimizer][1], num_epochs=2, **OPTIONS.get(optimizer, {}))
    refuse_unused(config)
    result = run(config, method_for(config))
    assert result["eval"]["eval/train/accuracy"] >= 0.95
    assert result["progress"]["samples"] == 2 * 608
    final = tmp_path / "run/final"
    if optimizer.startswith("lora"):
        with using_peft() as peft:
            base = load_classifier(model, 2, presets=PRESETS, seed=7)
            base.load_state_dict(load_classifier(model, 2, presets=PRESETS).state_dict())
            base.config.pad_token_id = 256
            read: Any = peft.PeftModel.from_pretrained(base, str(final)).eval()
    else:
        read = AutoModelForSequenceClassification.from_pretrained(final)
    held = [row for n, row in enumerate(map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())) if n % 20 == 19]
    right = 0
    for row in held:
        ids = torch.tensor([examples.tokens(byte_tokenizer(), [row["sentence"]], 24)])
        right += int(read(input_ids=ids).logits.argmax()) == row["label"]
    assert right / len(held) == pytest.approx(result["eval"]["eval/train/accuracy"])


@pytest.mark.slow
def test_a_resumed_classifier_equals_an_uninterrupted_one_and_best_and_last_epoch_are_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train.jsonl", 160, pair=True)
    options = {"task": "mrpc", "num_epochs": 4, "save_every": "epoch", "model": "llama_test", "micro_batch_size": 8}
    whole = make(tmp_path, output_dir=tmp_path / "whole", **options)
    run(whole, method_for(whole))
    first = make(tmp_path, output_dir=tmp_path / "part", **{**options, "num_epochs": 2})
    run(first, method_for(first))
    second = make(tmp_path, output_dir=tmp_path / "part", resume="auto", **options)
    run(second, method_for(second))
    ours, theirs = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    found = summary(tmp_path / "whole", "mrpc")
    records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    held_out = [record["eval/train/accuracy"] for record in records if "eval/train/accuracy" in record and record["step"] > 0]
    assert len(held_out) == 4, "one evaluation per epoch"
    assert found["best"]["eval/train/accuracy"] == max(held_out)
    assert found["last"]["eval/train/f1"] == [record for record in records if "eval/train/f1" in record][-1]["eval/train/f1"]
    assert "best epoch" in capsys.readouterr().out


def test_the_command_reports_epochs_and_eval_gives_the_same_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.jsonl", 60)
    write(tmp_path / "valid.jsonl", 30, seed=1)
    words = "--mode finetuning --task sst2 --optimizer baseline --model roberta_test --tokenizer bytes --dtype fp32 --lr 3e-3"
    words += f" --num_epochs 1 --batch_size 8 --max_length 24 --data {tmp_path}/train.jsonl --validation_files {tmp_path}/valid.jsonl"
    cli.main(["train", *words.split(), "-o", str(tmp_path / "run"), "--json"], standalone_mode=False)
    trained = json.loads(capsys.readouterr().out)
    cli.main(["eval", "--checkpoint", str(tmp_path / "run"), "--json"], standalone_mode=False)
    again = json.loads(capsys.readouterr().out)["sources"]["valid"]
    assert again["accuracy"] == trained["epochs"]["last"]["eval/valid/accuracy"]
    assert again["loss"] == pytest.approx(trained["epochs"]["last"]["eval/valid/loss"], rel=1e-5)
    assert "perplexity" not in again


def test_scores_are_those_of_scipy_and_of_their_definitions() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 5, 50).astype(float), draw.normal(size=50)
    assert scores.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic)
    assert scores.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    predicted, true = draw.integers(0, 2, 60).astype(float), draw.integers(0, 2, 60).astype(float)
    tp, fp = ((predicted == 1) & (true == 1)).sum(), ((predicted == 1) & (true == 0)).sum()
    fn, tn = ((predicted == 0) & (true == 1)).sum(), ((predicted == 0) & (true == 0)).sum()
    assert scores.f1(predicted, true) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = np.sqrt(float(tp + fp) * float(tp + fn) * float(tn + fp) * float(tn + fn))
    assert scores.matthews(predicted, true) == pytest.approx((tp * tn - fp * fn) / root)
    assert scores.matthews(np.zeros(4), np.array([0.0, 1, 0, 1])) == 0
    assert scores.f1(np.zeros(2), np.zeros(2)) == 0


@pytest.mark.parametrize("model", ["roberta_test", "gpt2_test", "llama_test"])
def test_padding_changes_no_logits(model: str, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 20)
    config = make(tmp_path, model=model)
    method = method_for(config)
    rows = method.data(method.tokenizer()).train["train"]
    module = method.build().eval()
    batch = rows.collate([rows[n] for n in range(6)])
    assert batch["attention_mask"].min() == 0
    together = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    alone = torch.cat([module(input_ids=torch.as_tensor(rows[n]["input_ids"])[None]).logits for n in range(6)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_regression_is_scored_by_correlations_and_squared_error(tmp_path: Path) -> None:
    lines = ["sentence1,sentence2,label", *(f"{'a' * n},{'b' * n},{n / 4}" for n in range(1, 25))]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    config = make(tmp_path, task="stsb", data=[str(tmp_path / "train.csv")], eval_data=[str(tmp_path / "train.csv")], num_epochs=2)
    method = method_for(config)
    result = run(config, method)
    assert method.build().config.num_labels == 1
    assert {"eval/train/pearson", "eval/train/spearman"} <= result["eval"].keys()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/final")
    rows = method.data(method.tokenizer()).valid["train"]
    model.requires_grad_(False)
    errors = [
        (float(model(input_ids=torch.as_tensor(rows[n]["input_ids"])[None]).logits) - rows[n]["label"]) ** 2 for n in range(len(rows))
    ]
    assert result["eval"]["eval/train/loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_pairs_are_cut_evenly_and_kept_apart() -> None:
    tokenizer = byte_tokenizer()
    assert examples.tokens(tokenizer, ["ab", "c"], 24) == [257, 97, 98, 258, 99]
    assert examples.tokens(tokenizer, ["abcdefgh", "xy"], 8) == [257, *b"abcd", 258, *b"xy"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence": "x", "label": 2}', r"train.jsonl:21 has the label 2, which is not one of 0 to 1"),
        ('{"sentence": "x", "label": "good"}', r"label 'good'"),
    ],
)
def test_labels_that_the_task_does_not_have_are_named_with_their_line(line: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", 20)
    path.write_text(path.read_text() + line + "\n")
    config = make(tmp_path)
    with pytest.raises(InputError, match=message):
        method_for(config).data(byte_tokenizer())


def test_what_cannot_work_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 4)
    pairs = make(tmp_path, task="rte")
    with pytest.raises(InputError, match="reads sentence1, sentence2 and label"):
        method_for(pairs).data(byte_tokenizer())
    with pytest.raises(ConfigError, match="predicts no next token"):
        make(tmp_path, mode="pretraining", task="lm")
    with pytest.raises(ConfigError, match="num_labels: 3 labels belong"):
        make(tmp_path, model="llama_test", task="lm", num_labels=3)
    with pytest.raises(ConfigError, match="task: only finetuning"):
        refuse_unused(make(tmp_path, model="llama_test", mode="pretraining", task="sst2"))
    with pytest.raises(ConfigError, match="beyond the 512 positions"):
        method_for(make(tmp_path, max_length=513)).build()
    small = method_for(make(tmp_path))
    small.tokenizer().add_tokens([f"<{n}>" for n in range(300)])
    with pytest.raises(ConfigError, match="tokenizer: it has 559 entries, and roberta_test has 512"):
        small.build()


def test_published_numbers_of_trained_parameters(tmp_path: Path) -> None:
    config = make(tmp_path, optimizer="lora", model="roberta_test")
    model = lora(model_of("roberta"), **adapter_config(config, "roberta"))
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert HUB_MODELS["roberta"]["hidden_size"] == 768
    assert sum(count for name, count in trained.items() if "lora_" in name) == 294_912
    assert sum(count for name, count in trained.items() if "lora_" not in name) == 592_130
    frozen = lora(model_of("roberta"), **adapter_config(make(tmp_path, optimizer="lora", lora={"train_base_modules": "none"}), "roberta"))
    assert sum(parameter.numel() for parameter in frozen.parameters() if parameter.requires_grad) == 294_912
