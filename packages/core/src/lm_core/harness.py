"""`<command> lm-eval ...`: EleutherAI's lm-evaluation-harness, to which the package's kinds of models are known. Imports no torch."""

from __future__ import annotations

import importlib
import sys

import click

from lm_core.errors import ConfigError

EXAMPLE = "lm-eval --model hf --model_args pretrained=FOLDER --tasks NAME --include_path FOLDER --device cpu"


def add_harness(cli: click.Group, *modules: str, example: str = EXAMPLE) -> None:
    """Give `cli` the command lm-eval, which imports `modules` and hands its arguments to the harness.

    A module makes its models known to transformers' Auto classes, or to the harness (`lm_eval.api.registry.register_model`).
    """

    @cli.command(
        "lm-eval",
        # flags are the harness's, not ours
        cls=click.Command,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        help=f"Run lm-evaluation-harness (pip install lm_eval) on a trained model: {example}",
    )
    @click.pass_context
    def harness(context: click.Context) -> None:
        try:
            from lm_eval.__main__ import cli_evaluate
        except ModuleNotFoundError as error:
            raise ConfigError(f"lm-eval: {error.name} is not installed; run pip install 'lm_eval>=0.4.9'") from None
        for module in modules:
            importlib.import_module(module)
        sys.argv = ["lm_eval", *context.args]
        cli_evaluate()
