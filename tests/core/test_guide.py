"""lm_core.guide: spellings of other guides mean options of core, and contradictions are refused."""

from __future__ import annotations

from typing import Any

import pytest

from lm_core.cli import command_group, configured
from lm_core.config import build, change, config, leaves
from lm_core.errors import ConfigError
from lm_core.flags import split
from lm_core.guide import TrainerSpellings
from lm_core.options import OptimOptions, RunConfig


@config
class Options(RunConfig, TrainerSpellings):
    betas: tuple[float, float] = change(OptimOptions, "betas", default=(0.9, 0.95))


def made(**given: Any) -> Options:
    """As a command reads them: the values, and what the spellings among them mean."""
    return build(Options, {"model": "m", "data": ["d"]}, given, *Options.further_layers(given))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"betas": (0.9, 0.95), "precision": "fp32", "wandb": "off"}),
        ({"adam_beta2": "0.999"}, {"betas": (0.9, 0.999)}),
        ({"adam_beta1": 0.8, "adam_beta2": 0.99}, {"betas": (0.8, 0.99)}),
        ({"bf16": "true"}, {"precision": "bf16"}),
        ({"fp16": True}, {"precision": "fp16"}),
        ({"bf16": False, "precision": "fp16"}, {"precision": "fp16"}),
        ({"report_to": "wandb"}, {"wandb": "online", "tensorboard": False}),
        ({"report_to": ["tensorboard", "wandb"]}, {"wandb": "online", "tensorboard": True}),
        ({"report_to": ["none"]}, {"wandb": "off", "tensorboard": False}),
    ],
)
def test_spellings_mean_options_of_core(given: dict[str, Any], expected: dict[str, Any]) -> None:
    options = made(**given)
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"adam_beta1": "fast"}, "adam_beta1: 'fast' is wrong"),
        ({"bf16": True, "fp16": True}, "bf16: True means precision bf16, but precision is fp16"),
        ({"bf16": False, "precision": "bf16"}, "bf16: false, but --precision is bf16"),
        ({"report_to": ["paper"]}, "report_to"),
    ],
)
def test_contradictions_and_wrong_values_are_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        made(**given)


def test_what_is_typed_beside_a_spelling_and_differs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"adam_beta1: 0.5 means betas \(0.5, 0.95\), but betas is \(0.9, 0.99\); drop one"):
        build(Options, {"model": "m", "data": ["d"], "adam_beta1": 0.5, "betas": (0.9, 0.99)})


def test_what_a_guide_says_of_what_holds_anyway_is_read_and_anything_else_refused() -> None:
    args = [
        "--do_train",
        "--optim",
        "adamw_torch",
        "--lr",
        "1",
        "--log_level",
        "info",
        "--ddp-find-unused-parameters=False",
        "--optim",
        "sgd",
    ]
    found = split(args, options=[*leaves(Options)], others=[], positional=False, words=Options.words)
    assert found.values == {"lr": "1"}
    assert found.notices == ["--log_level: has no effect here; warnings are always shown, notices unless --quiet is given"]
    assert found.mistakes == ["--optim sgd: cannot be had; AdamW is the optimizer"]


def test_commands_read_the_words_of_their_options_and_the_rank_of_deepspeeds_launcher() -> None:
    cli = command_group("A guide's.")
    learned = []

    @cli.command()
    @configured(Options)
    def train(options: Options) -> None:
        learned.append(options.lr)

    cli.main(
        ["--local_rank=1", "train", "--model", "m", "--data", "d", "--lr", "0.5", "--do_train", "--ddp_timeout", "3"], standalone_mode=False
    )
    assert learned == [0.5]
