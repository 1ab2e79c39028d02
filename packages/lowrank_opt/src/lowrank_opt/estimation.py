"""`lowrank-opt estimate`: memory by part for every optimizer side by side, then the dry run of `train`."""

from __future__ import annotations

import typing
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from lm_core.errors import ConfigError
from lm_core.models import hf_model
from lowrank_opt.choose import low_rank_settings
from lowrank_opt.config import TrainConfig
from lowrank_opt.memory import Memory, estimate_memory
from lowrank_opt.method import method_for
from lowrank_opt.optimizer_options import OPTIMIZERS, moment_bits
from lowrank_opt.resolve import again

ROWS = {
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "moments": "moments",
    "bases": "bases",
    "low_rank_states": "low-rank states",
    "workspace": "workspace",
    "activations_rough": "activations (rough)",
    "total": "total",
}


def side_by_side(config: TrainConfig) -> dict[str, Memory]:
    """Bytes by part for every optimizer under otherwise equal options, the chosen one first; those that an option rules out are left out.
    Nothing is allocated."""
    found: dict[str, Memory] = {config.optimizer: one(config)}
    for name in typing.get_args(OPTIMIZERS):
        with suppress(ConfigError):
            found |= {} if name in found else {name: one(again(config, optimizer=name))}
    return found


def one(config: TrainConfig) -> Memory:
    """Bytes by part of the run that `config` describes."""
    with torch.device("meta"):
        model = hf_model(method_for(config).build())
    galore, settings = config.galore, low_rank_settings(config)
    memory = estimate_memory(
        model,
        # the same optimizer at a rank that may be chosen
        config.optimizer.removesuffix("-mini"),
        rank=settings.get("rank", 1),
        proj_type=settings.get("proj_type", "std"),
        proj_dtype=settings.get("proj_dtype"),
        weight_dtype=config.galore.weight_dtype if config.optimizer == "qgalore" else "param",
        error_feedback=config.ldadam.ldadam_error_feedback,
        proj_method=settings.get("proj_method", "auto"),
        oversample=galore.oversample,
        state_bits=moment_bits(config),
        embedding_state_bits=galore.embedding_state_bits,
        block_size=galore.block_size,
        min_8bit_size=galore.min_8bit_size,
        full_rank_policy=settings.get("full_rank_policy", "identity"),
        target_modules=galore.target_modules if galore.target_modules != ["auto"] else "auto",
        exclude_modules=galore.exclude_modules,
        per_layer=config.per_layer,
        accumulate=config.accumulate,
        tokens=config.micro_batch_size * config.max_length,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return replace(memory, optimizer=config.optimizer)


def table(found: dict[str, Memory]) -> str:
    """The estimates in MiB, one optimizer per line."""
    width = max(map(len, found))
    lines = [f"{'MiB':{width}}  " + "  ".join(f"{head:>9}" for head in ROWS.values()) + "  bytes/parameter"]
    for name, memory in found.items():
        values = memory.as_dict()
        numbers = "  ".join(f"{values[row] / 2**20:{max(9, len(head))}.1f}" for row, head in ROWS.items())
        lines.append(f"{name:{width}}  {numbers}  {values['bytes_per_parameter']:15.2f}")
    return "\n".join(lines)


def run(config: TrainConfig) -> dict[str, Any]:
    """Print the table; with data, also measure one micro-batch. States are exact, activations rough."""
    found = side_by_side(config)
    print(table(found))
    result: dict[str, Any] = {"optimizers": {name: memory.as_dict() for name, memory in found.items()}}
    if config.data:
        from lm_core.run import run as train

        dry = again(config, dry_run=True)
        result["dry_run"] = train(dry, method_for(dry))
    return result
