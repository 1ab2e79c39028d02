"""Commands that prepare a corpus."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from lm_core.cli import Command, Group, configured
from moe_cpt.config import TrainConfig
from moe_cpt.options.corpus import FilterConfig, PackConfig, TokenizeConfig


@click.command(cls=Command)
@configured(TokenizeConfig)
def tokenize(config: TokenizeConfig) -> dict[str, Any]:
    """Text to lines of token ids, file by file.

    Example: moe-cpt tokenize -i raw/ -o tokenised/ -t smollm2-135m -f jsonl -p 4
    """
    from moe_cpt.corpus import tokenize as run

    return _counted(run(config))


@click.command(cls=Command)
@configured(PackConfig)
def pack(config: PackConfig) -> dict[str, Any]:
    """Tokenised documents to memory-mapped shards, source by source.

    Example: moe-cpt pack -i tokenised/ -o packed/ -t smollm2-135m
    """
    from moe_cpt.corpus import pack as run

    return _counted(run(config))


@click.command("filter", cls=Command)
@configured(FilterConfig)
def keep(config: FilterConfig) -> dict[str, Any]:
    """Keep the records whose number lies within bounds, both included.

    Example: moe-cpt filter -i raw/ -o fluent/ --column fluency --min 0.7 --report kept.json
    """
    from moe_cpt.corpus import keep_between

    counts = _counted(keep_between(config))
    if config.report is not None:
        config.report.write_text(json.dumps(counts, indent=1) + "\n")
    return counts


def _counted(counts: Mapping[str, Any]) -> dict[str, Any]:
    for name, count in counts.items():
        print(f"{name}: kept {count.kept:,}, left out {count.dropped:,}" + (f", tokens {count.tokens:,}" if count.tokens else ""))
    return {name: asdict(count) for name, count in counts.items()}


@click.group(cls=Group)
def data() -> None:
    """Look at training data."""


@data.command()
@configured(TrainConfig)
def check(config: TrainConfig) -> dict[str, Any]:
    """Read the data as train would, and print documents, tokens, samples and shares by source.

    Example: moe-cpt data check --model smollm2-135m --dataset_dir packed/ --validation_dir val/ --prob_map uniform
    """
    from lm_core.data.vocab import build_tokenizer
    from moe_cpt.data import described

    found = described(config, build_tokenizer(config))
    for source, facts in found.items():
        print(f"{source}:", ", ".join(f"{name} {value:,.6g}" for name, value in facts.items()))
    return found
