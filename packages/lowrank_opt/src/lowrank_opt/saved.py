"""What a run has left behind: its newest checkpoint, its options, and the model that they make together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_core.config import build
from lm_core.errors import ConfigError, InputError
from lowrank_opt.config import TrainConfig
from lowrank_opt.resolve import again

if TYPE_CHECKING:
    from lm_core.engine.replicated import Replicated
    from lowrank_opt.method import LowRank


def newest(folder: Path) -> Path:
    """The checkpoint that `folder` is, or the newest one of the run that it is. Raises InputError when there is none."""
    from lm_core import checkpoint

    if (folder / "state.json").is_file():
        return folder
    found = checkpoint.latest(folder) if folder.is_dir() else None
    if found is None:
        raise InputError(f"checkpoint: {folder} holds no complete checkpoint; name a run folder, or a checkpoint-<step> folder in it")
    return found


def options(checkpoint: Path, changes: Mapping[str, Any]) -> TrainConfig:
    """The options that a checkpoint was written with, and `changes`; it starts nothing anew."""
    from lm_core.checkpoint import verified

    state = verified(checkpoint)
    if state["engine"]["kind"] != "replicated":
        raise InputError(
            f"checkpoint: {checkpoint} holds the shards of the {state['engine']['kind']} engine; use the folder final/ of the run, "
            "which any command takes as --model"
        )
    if "optimizer" not in state["config"] or "mode" not in state["config"]:
        raise InputError(f"checkpoint: {checkpoint} was not written by lowrank-opt train; name a run of this command")
    known = {name: value for name, value in state["config"].items() if name in TrainConfig.__dataclass_fields__}
    return build(TrainConfig, {**known, "resume": "none", "overwrite": False, "dry_run": False, "num_processes": 1, **changes})


def load(checkpoint: Path, config: TrainConfig, method: LowRank | None = None) -> tuple[Replicated, LowRank]:
    """The trained model of a checkpoint inside an engine, without its optimizer state."""
    from lm_core import dist
    from lm_core.engine.replicated import Replicated
    from lowrank_opt.method import method_for

    method = method or method_for(again(config, per_layer=False))
    engine = Replicated(method.config, method, method.build(), dist.init(config.device))
    engine.load_weights(checkpoint)
    return engine, method


def progress(checkpoint: Path) -> dict[str, Any]:
    """Steps, tokens and so on at which a checkpoint was written."""
    return dict(json.loads((checkpoint / "state.json").read_text())["progress"])


def refuse_existing(folder: Path) -> None:
    """Raise ConfigError where something would be overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"out: {folder} exists already; name a new folder")
