"""The command `prefix-lm`."""

from __future__ import annotations

from typing import Any

from lm_core.cli import command_group, configured
from prefix_lm.config import PrefixLMConfig

cli = command_group("Language models that read the beginning of a document in both directions.")


@cli.command()
@configured(PrefixLMConfig)
def train(config: PrefixLMConfig) -> dict[str, Any]:
    """Train a prefix language model."""
    from lm_core.run import run
    from prefix_lm.method import PrefixLM

    return run(config, PrefixLM(config))
