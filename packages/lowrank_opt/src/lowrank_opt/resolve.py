"""From the options as they were given to those of the run: other words replaced, default data, what a file says for another optimizer left out."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_core.config import explicit, leaves
from lm_core.errors import ConfigError
from lowrank_opt.checks import processes, used_by
from lowrank_opt.config import TrainConfig
from lowrank_opt.optimizer_options import PROJECTED

log = logging.getLogger("lowrank_opt")


def resolved(config: TrainConfig) -> TrainConfig:
    """`config` as it runs: the smoke test in float32, and the total batch as a number of micro-batches."""
    if config.test:
        config = again(config, precision="fp32", param_dtype="auto", wandb="off")
    by_epochs = not config.budget and config.max_steps is None
    if by_epochs and config.schedule == "cosine_tmax" and config.tmax_unit == "epoch" and config.num_epochs > config.tmax:
        log.warning(
            "tmax: %d epochs are longer than --tmax %d; the learning rate stays at its end, --min-lr-ratio %g of the peak, for the rest",
            config.num_epochs, config.tmax, config.min_lr_ratio,
        )  # fmt: skip
    if config.packing in ("false", "true"):
        config = again(config, packing="stream" if config.packing == "true" else "document")
    if config.nonfinite == "skip":
        config = again(config, nonfinite="drop")
    if config.classifies() and "eval_every" not in explicit(config):
        config = again(config, eval_every="epoch")
    if config.total_batch_size is not None:
        config = again(config, accumulate=config.total_batch_size // (config.micro_batch_size * processes(config)))
    return config


def with_data(config: TrainConfig) -> TrainConfig:
    """`config` with the default data of pretraining, C4 from the hub, as many rows as one epoch of tokens takes; and with
    --dataset-config behind the hub data sets that name none."""
    if not config.data and config.mode == "finetuning" and not config.classifies():
        raise ConfigError("data: nothing to train on; give --data, for example --data builtin:python-docs, or a --task")
    if config.data and "c4" not in config.data and config.dataset_config is None:
        return config
    if config.classifies():
        if config.dataset_config is not None:
            raise ConfigError(f"dataset_config: --task {config.task} says which part of GLUE is meant; drop it")
        return config
    c4 = f"allenai/c4:{config.dataset_config or 'en'}[{rows_of_an_epoch(config)}]"
    given = config.data or ["c4"]
    data = [c4 if source == "c4" else with_configuration(source, config.dataset_config) for source in given]
    if config.dataset_config is not None and data == given:
        raise ConfigError(f"dataset_config: no --data is a hub data set without a configuration ({', '.join(given)}); drop it")
    return again(config, data=data)


def rows_of_an_epoch(config: TrainConfig) -> int:
    """Documents that make up one epoch of tokens: they are cut to max_length, and the mean one of C4 has more than 200 tokens."""
    return math.ceil(config.num_training_tokens / min(200, config.max_length / 2))


def with_configuration(source: str, name: str | None) -> str:
    """A data argument with the configuration `name`, if it is a hub id OWNER/NAME without one.

    >>> with_configuration("owner/texts[100]@0.5", "en"), with_configuration("builtin:stdlib", "en")
    ('owner/texts:en[100]@0.5', 'builtin:stdlib')
    """
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)((\[[^\[\]]*\])?(@[^@/\[\]]*)?)", source)
    if name is None or found is None or Path(source).expanduser().exists() or Path(found[1]).expanduser().exists():
        return source
    return f"{found[1]}:{name}{found[2]}"


def again(config: TrainConfig, **values: Any) -> TrainConfig:
    """`config` with other values, whichever of the two was given on the command line."""
    made = replace(config, **values)
    object.__setattr__(made, "_given", vars(config).get("_given", frozenset()))
    return made


def without_foreign(config: TrainConfig) -> TrainConfig:
    """`config` without what a file says for its own optimizer, where the command line names another; what is left out is logged."""
    given = vars(config).get("_given", frozenset())
    if "optimizer" not in given or given & {"galore_config", "lora_config"}:
        return config
    found = {path for path in explicit(config) - given if (users := used_by(config, path)) and config.optimizer not in users}
    if not found:
        return config
    log.warning("optimizer: --optimizer %s does not use %s of the file; they are left out", config.optimizer, ", ".join(sorted(found)))
    foreign = [leaf for leaf in leaves(TrainConfig) if leaf.path in found]
    sections = {leaf.path.partition(".")[0] for leaf in foreign}
    defaults = {
        name: {leaf.path.partition(".")[2]: leaf.default for leaf in foreign if leaf.path.startswith(name + ".")} for name in sections
    }
    return again(config, **{name: replace(getattr(config, name), **values) for name, values in defaults.items()})


def tell_packaged(config: TrainConfig) -> None:
    """Say that the packaged values stand for a JSON file of the optimizer that is neither named nor in its usual place."""
    wanted = {
        "lora_config": (config.lora_config, config.optimizer.startswith("lora")),
        "galore_config": (config.galore_config, config.optimizer in (*PROJECTED, "apollo", "apollo-mini", "ldadam")),
    }
    for option, (path, used) in wanted.items():
        if used and not path.exists():
            log.info("%s: there is no %s; the packaged values hold where no option says otherwise", option, path)
