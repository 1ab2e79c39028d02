"""What a run does, in numbers that need no model: updates, tokens, parameters. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_core.errors import InputError, reading
from lm_core.lazy import callable_as_its_function

if TYPE_CHECKING:
    from moe_cpt.config import TrainConfig


@dataclass(frozen=True)
class Counts:
    """Parameters: of the dense model, of the mixture, and those of the mixture that one token passes through."""

    dense: int
    total: int
    active: int


@dataclass(frozen=True)
class Plan:
    """Updates and sizes of a run."""

    max_steps: int
    global_batch: int
    tokens_per_batch: int

    def lines(self, warmup: float, eval_steps: int | None) -> list[str]:
        """Samples, warm-up and evaluation interval in steps and tokens. A `warmup` below 1 is a fraction of the run."""
        steps = round(warmup * self.max_steps) if warmup < 1 else int(warmup)
        held_out = "never" if eval_steps is None else f"every {eval_steps} steps ({eval_steps * self.tokens_per_batch} tokens)"
        return [
            f"max_train_samples: {self.max_steps * self.global_batch}",
            f"warmup: {steps} steps ({steps * self.tokens_per_batch} tokens)",
            f"evaluation: {held_out}",
        ]

    @property
    def header(self) -> str:
        """The first three lines of a run's log; other tools read them."""
        return f"max_steps: {self.max_steps}\nglobal batch size: {self.global_batch}\n#tokens/batch: {self.tokens_per_batch}"


def plan(cfg: TrainConfig) -> Plan:
    """The updates and sizes of a run. Raises ConfigError for a budget that only the data or the clock turns into updates."""
    return cfg.plan()


def comma_separated(arguments: Sequence[str]) -> list[str]:
    """Data arguments one by one: a comma list is taken apart unless it is a path."""
    return [part for argument in arguments for part in ([argument] if Path(argument).exists() else argument.split(","))]


def hours_of(steps: int, seconds_per_step: float) -> str:
    """Hours of a run, and when it would end if it began now."""
    seconds = steps * seconds_per_step
    finish = datetime.now().astimezone() + timedelta(seconds=seconds)
    return f"hours: {seconds / 3600:.2f}, until {finish:%Y-%m-%d %H:%M %Z}"


def steps_of_tokens(num_tokens: int, tokens_per_batch: int) -> int:
    """Whole updates in a number of tokens, in exact integers.

    >>> steps_of_tokens(10**11, 16 * 1 * 6 * 8 * 2048)
    63578
    """
    return num_tokens // tokens_per_batch


def parameter_counts(config: Mapping[str, Any]) -> Counts:
    """By the fields of a LLaMA or LlamaMoE config (numbers as in its config.json). Zero neurons added for alignment do not count.

    >>> llama_7b = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
    >>> parameter_counts({**llama_7b, "num_attention_heads": 32, "gate_add_noise": False, "num_experts": 16, "num_selects": 4}).active
    3494129664
    """
    vocabulary, hidden, layers = config["vocab_size"], config["hidden_size"], config["num_hidden_layers"]
    width, heads = config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_dim * (heads + (config.get("num_key_value_heads") or heads))
    tables = 1 if config.get("tie_word_embeddings") else 2
    dense = tables * vocabulary * hidden + hidden + layers * (attention + 3 * hidden * width + 2 * hidden)
    if "num_experts" not in config:
        return Counts(dense, dense, dense)
    # brings transformers along
    from moe_cpt.hf.configuration_llama_moe import converted_layers

    experts, shared = config["num_experts"], config.get("num_shared_experts", 0)
    kind = config.get("gate_type", "TopKBalancedNoisyGate")
    router = experts * hidden
    if config.get("gate_network", "mlp") == "mlp":
        router += experts * experts
    if kind == "TopKBalancedNoisyGate" and config.get("gate_add_noise", True):
        router += experts * hidden
    # a gate that does not look at the token has no weights
    router = (0 if kind.endswith("PlainGate") else router) + bool(config.get("add_weight_norm"))
    chosen, sizes = converted_layers(config.get("moe_layers", "all"), layers), config.get("size_experts")
    # neurons of one routed expert: their mean where they differ
    size = width / (experts + shared) if sizes is None else sum(sum(sizes[layer]) for layer in chosen) / (len(chosen) * experts)
    without = dense + len(chosen) * (router - 3 * hidden * width)
    return Counts(
        dense,
        without + round(len(chosen) * 3 * hidden * size * (experts + shared)),
        without + round(len(chosen) * 3 * hidden * size * (config["num_selects"] + shared)),
    )


def seconds_per_step(logdir: Path) -> float:
    """Mean seconds of an update in an earlier run."""
    path = logdir / "metrics.jsonl"
    way_out = "name a run folder, or give --seconds-per-step"
    with reading(f"logdir: {path}", way_out):
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        if not rows or not rows[-1]["step"]:
            raise InputError(f"logdir: {logdir} holds no metrics of a run with steps; {way_out}")
        return float(rows[-1]["seconds"] / rows[-1]["step"])


callable_as_its_function(__name__)
