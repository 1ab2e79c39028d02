"""A run of `pretrain`: core's, with what this package adds to its result."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lm_core import dist
from lm_core.engine.state import write_json
from lm_core.errors import Interrupted, RunFailed
from lm_core.run import run
from lm_core.sinks import read
from mdm_scaling.config import PretrainConfig
from mdm_scaling.method import Pretrain, describe
from mdm_scaling.sweep import run_id

logger = logging.getLogger(__name__)
KNOBS = (
    "attention_dropout",
    "ar_ratio",
    "randmask_ratio",
    "randmask_mode",
    "num_order_list",
    "use_predefined_order",
    "order_target_position",
)
STATUS = {"budget": "done", "loss": "done", "killed": "killed", "interrupted": "preempted", "failed": "failed"}


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train, and write beside core's entries of `result.json` what tables and fits need."""
    logger.info(describe(config))
    if config.num_orders > 1 and config.order_target_position == "none":
        logger.warning(
            "num_order_list: a model is not told which position comes next, so what it should predict in other orders is ambiguous; "
            "add --order-target-position embedding"
        )
    if config.kill_file is not None and config.kill_file.exists():
        logger.warning("kill_file: %s exists, so nothing is trained", config.kill_file)
        return {"status": "killed", "steps": 0}
    method = Pretrain(config)
    if config.dry_run:
        return run(config, method)
    try:
        run(config, method)
    except (RunFailed, Interrupted):
        # any other error means that nothing began, and what lies in the folder is of another run
        if dist.rank() == 0:
            extend(config.run_folder(), config, method.parameters)
        raise
    if dist.rank() == 0:
        extend(config.run_folder(), config, method.parameters)
    return json.loads((config.run_folder() / "result.json").read_text())  # type: ignore[no-any-return]


def extend(folder: Path, config: PretrainConfig, parameters: int) -> None:
    """Add the section `scaling` to a result, if the run got far enough to have one."""
    path = folder / "result.json"
    if not path.exists():
        return
    result = json.loads(path.read_text())
    progress = result["progress"]
    losses = evaluations(folder)
    steps = sorted({step for curve in losses.values() for step in curve})
    means = {step: sum(curve[step] for curve in losses.values()) / len(losses) for step in steps}
    best = min(means, key=lambda step: means[step], default=None)
    tokens = progress["samples"] * config.max_length
    per_epoch = config.unique_tokens or _unique(folder)
    unique = min(per_epoch, tokens) if per_epoch else None
    write_json(
        path,
        {
            **result,
            "id": run_id(config),
            "status": STATUS.get(result["reason"]["kind"], "failed"),
            "scaling": {
                "objective": config.objective,
                "preset": config.model,
                "N": config.count,
                "N_exact": parameters,
                "D": tokens,
                "U": unique,
                "epochs": tokens / unique if unique else None,
                "C": 6 * config.count * tokens,
                "real_flops": progress["flops"],
                "steps": progress["steps"],
                "skipped_steps": progress["skipped"],
                "seconds": progress["seconds"],
                "estimator": "ar" if config.objective == "ar" else f"stratified,mc={config.num_mc}",
                "loss": means[best] if best is not None else None,
                "best_loss": means[best] if best is not None else None,
                "best_step": best,
                "final_loss": means[steps[-1]] if steps else None,
                "loss_se": error(folder, best) if best is not None else None,
                "seed": config.seed,
                "knobs": {name: getattr(config, name) for name in KNOBS},
            },
        },
    )


def evaluations(folder: Path) -> dict[str, dict[int, float]]:
    """Held-out losses by source and step, as metrics.jsonl has them."""
    found: dict[str, dict[int, float]] = {}
    for record in read(folder / "metrics.jsonl"):
        for name, value in record.items():
            if name.startswith("eval/") and name.endswith("/loss"):
                found.setdefault(name, {})[int(record["step"])] = value
    return found


def error(folder: Path, step: int) -> float | None:
    """Standard error of the mean over sources at one step."""
    for record in read(folder / "metrics.jsonl"):
        if int(record["step"]) == step:
            errors = [value for name, value in record.items() if name.startswith("eval/") and name.endswith("/standard_error")]
            if errors and all(value == value for value in errors):
                return float(sum(value**2 for value in errors) ** 0.5 / len(errors))
    return None


def _unique(folder: Path) -> int | None:
    """Tokens of one epoch, as the run found them."""
    for record in read(folder / "metrics.jsonl"):
        if record.get("epoch") and record["samples"]:
            return round(record["tokens"] / record["epoch"])
    return None
