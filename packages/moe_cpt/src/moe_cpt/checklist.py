"""What to look at before a long run: resolved values, and those that are probably mistakes. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_cpt.config import TrainConfig
from moe_cpt.models import PRESETS
from moe_cpt.plan import comma_separated


@dataclass(frozen=True)
class Item:
    """One line; `problem` says why it should be looked at again."""

    name: str
    value: object
    problem: str | None = None

    def __str__(self) -> str:
        return f"[{'!' if self.problem else 'x'}] {self.name}: {self.value}" + (f" ({self.problem})" if self.problem else "")


def checklist(config: TrainConfig) -> list[Item]:
    """The twelve items of a run."""
    return list(_items(config))


def _items(config: TrainConfig) -> Iterator[Item]:
    stored = _stored(config)
    plan = config.plan()
    experts = stored.get("num_experts", config.num_experts)
    selects = config.num_selects or stored.get("num_selects", 4)
    scale = config.score_scale_factor or stored.get("score_scale_factor", experts / selects)
    weight = stored.get("gate_balance_loss_weight", 0.01) if config.gate_balance_loss_weight is None else config.gate_balance_loss_weight
    usual = experts / selects
    warmup = round(config.warmup * plan.max_steps) if config.warmup < 1 else config.warmup
    interval = config.eval_steps()
    running = int(os.environ.get("WORLD_SIZE", config.num_processes))
    absent = [path for path in comma_separated(config.data) if _is_absent(path)]

    yield Item("balance loss weight", weight)
    yield Item("scale factor", scale, None if scale == usual or config.k_schedule else f"experts / selected experts is {usual:g}")
    yield Item("learning rate", f"{config.lr:g}")
    yield Item("warmup steps", warmup, None if warmup < plan.max_steps else f"the run has {plan.max_steps} steps")
    yield Item(
        "evaluation steps",
        interval or "never",
        f"the run has {plan.max_steps} steps" if interval is not None and interval > plan.max_steps else None,
    )
    yield Item("logging steps", config.log_every)
    yield Item("global batch size", plan.global_batch)
    yield Item("selected experts", f"{selects} of {experts}")
    yield Item("pretrained model", config.model, "does not exist" if _is_absent(config.model) else None)
    yield Item(
        "data path", ", ".join(config.data) or "none", f"{absent[0]} does not exist" if absent else None if config.data else "no data"
    )
    yield Item("GPUs", config.devices(), None if config.devices() == running else f"the launcher started {running} processes")
    yield Item("comment", config.comment or "none", None if config.comment else "say what the run is for with --comment")


def _stored(config: TrainConfig) -> dict[str, Any]:
    """The config of the checkpoint, where there is a folder to read it from."""
    path = Path(config.model) / "config.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.is_file() and config.from_dense == "none" else {}
    return stored


def _is_absent(name: str) -> bool:
    """Whether `name` is a path to nothing; names of built-in things and of the hub are not paths."""
    if name in PRESETS or name.startswith(("builtin:", "synthetic:")):
        return False
    path = name.partition("@")[0].partition("[")[0]
    looks_like_a_path = path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith((".jsonl", ".json", ".txt", ".gguf"))
    return looks_like_a_path and not Path(path).expanduser().exists()
