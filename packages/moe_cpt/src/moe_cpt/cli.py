"""The `moe-cpt` command; its commands that train stand here."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from lm_core.cli import command_group, configured
from lm_core.cli import main as run_cli
from lm_core.config import to_dict
from lm_core.errors import ConfigError, ResumeRefused, RunFailed
from lm_core.harness import add_harness
from moe_cpt.commands import checks, conversion, corpus, slurm, splits
from moe_cpt.config import PlanConfig, SFTConfig, TrainConfig
from moe_cpt.plan import Counts, hours_of, parameter_counts, seconds_per_step

logger = logging.getLogger(__name__)
cli = command_group("Dense LLaMA models into mixtures of experts, and their continued pre-training.")
for command in (
    *(splits.split, splits.features, splits.cluster_text, splits.score),
    *(conversion.train_gate, conversion.convert, conversion.calibrate_scale, conversion.export, conversion.import_legacy),
    *(corpus.tokenize, corpus.pack, corpus.keep, corpus.data),
    *(checks.inspect, checks.evaluate, checks.ref_loss, checks.report, checks.tb_spec, checks.bench, slurm.slurm),
):
    cli.add_command(command)

# what a refused resume names where --allow-data-change would accept it
LEAVES = ("data", "prob_map", "reference_loss", "max_length", "seed", "global_batch")


@cli.command()
@configured(TrainConfig)
def train(config: TrainConfig) -> dict[str, Any]:
    """Continue the pre-training of a mixture.

    Example: moe-cpt train --model smollm2-135m --from_dense random --data builtin:python-docs --block_size 256 --max_steps 20 --warmup 2
    """
    require_launched(config)
    if config.require_checklist:
        _require(config)
    planned = not config.limits().limits.keys() & {"epochs", "hours", "targets"} and os.environ.get("RANK", "0") == "0"
    if planned:
        # before what takes seconds to import
        logger.info(config.plan().header)
    from lm_core.run import run
    from moe_cpt.method import MoeCPT

    method = MoeCPT(config)
    if planned:
        logger.info("\n".join(announced(config, parameter_counts(method.model_config().to_dict()))))
    with naming_the_leave():
        result = run(config, method)
    method.keep_split()
    return result


@cli.command()
@configured(SFTConfig)
def sft(config: SFTConfig) -> dict[str, Any]:
    """Tune a mixture on conversations.

    Example: moe-cpt sft --model_name_or_path runs/moe/final --dataset_dir_or_path builtin:python-docs --model_max_length 256 --max_steps 20
    """
    require_launched(config)
    from lm_core.run import run
    from moe_cpt.sft import SupervisedTuning

    method = SupervisedTuning(config)
    with naming_the_leave():
        result = run(config, method)
    method.keep_split()
    return result


@cli.command()
@configured(PlanConfig)
def plan(config: PlanConfig) -> dict[str, Any]:
    """Print what a run would do: updates, samples, parameters, memory of a process, and its hours where a speed is given.

    Example: moe-cpt plan --model smollm2-135m --from_dense random --num_tokens 1B --seconds_per_step 2
    """
    from moe_cpt.method import MoeCPT, planned_memory

    made, counts = config.plan(), parameter_counts(MoeCPT(config).model_config().to_dict())
    memory = planned_memory(config)
    seconds = config.seconds_per_step if config.logdir is None else seconds_per_step(config.logdir)
    told = [f"{memory} of a process that holds the whole model"] if memory else []
    print(made.header, *announced(config, counts), *told, *([] if seconds is None else [hours_of(made.max_steps, seconds)]), sep="\n")
    return {
        "max_steps": made.max_steps,
        "global_batch_size": made.global_batch,
        "tokens_per_batch": made.tokens_per_batch,
        "parameters": {"active": counts.active, "total": counts.total, "dense": counts.dense},
        "memory": None if memory is None else asdict(memory),
        "hours": None if seconds is None else made.max_steps * seconds / 3600,
    }


@cli.command()
@configured(TrainConfig)
def checklist(config: TrainConfig) -> dict[str, Any]:
    """Print the values of a run that are worth a look before it starts, and mark those that look wrong.

    Example: moe-cpt checklist --model smollm2-135m --from_dense random --data builtin:python-docs --num_tokens 1M --comment "first try"
    """
    from moe_cpt.checklist import checklist as items_of

    items = items_of(config)
    print(*items, sep="\n")
    return {"items": [{"name": item.name, "value": item.value, "problem": item.problem} for item in items]}


def announced(config: TrainConfig, counts: Counts) -> list[str]:
    """What follows the header in the log of a run: samples, warm-up, evaluations, parameters, and all options."""
    return [
        *config.plan().lines(config.warmup, config.eval_steps()),
        f"parameters: active {counts.active}, total {counts.total}, dense {counts.dense}",
        f"launch: {json.dumps(to_dict(config), default=str)}",
    ]


def _require(config: TrainConfig) -> None:
    """Print the checklist; raise RunFailed when an item fails."""
    from moe_cpt.checklist import checklist as items_of

    items = items_of(config)
    print(*items, sep="\n", file=sys.stderr)
    if wrong := [item.name for item in items if item.problem]:
        raise RunFailed(f"require_checklist: {', '.join(wrong)} should be looked at again; correct them, or leave out --require-checklist")


def require_launched(config: TrainConfig) -> None:
    """Raise ConfigError when the run has not the processes that the options name."""
    if config.dry_run or (config.num_nodes is None and config.num_gpu_per_node is None):
        return
    for variable, name in (("SLURM_NNODES", "num_nodes"), ("SLURM_GPUS_ON_NODE", "num_gpu_per_node")):
        given, named = os.environ.get(variable, ""), getattr(config, name)
        if given.isdigit() and named is not None and int(given) != named:
            raise ConfigError(f"{name}: {named}, but {variable} is {given}; correct one of them (moe-cpt slurm check finds such lines)")
    running = int(os.environ.get("WORLD_SIZE", config.num_processes))
    if config.devices() != running:
        named = f"{config.num_nodes or 1} x {config.num_gpu_per_node or 1} processes"
        raise ConfigError(f"num_gpu_per_node: {named} are named, but this run has {running}; correct them, or the launcher")


@contextmanager
def naming_the_leave() -> Iterator[None]:
    """A resume that is refused for what --allow-data-change accepts says so."""
    try:
        yield
    except ResumeRefused as refusal:
        field = str(refusal).partition(":")[0].replace(" ", "_")
        if field in LEAVES:
            raise ResumeRefused(f"{refusal}, or add --allow-data-change") from None
        raise


add_harness(cli, "moe_cpt.model")


def main() -> None:
    """Entry point of the package."""
    run_cli(cli)
