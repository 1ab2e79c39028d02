"""From options to an optimizer: which class, and which settings its low-rank groups get."""

from __future__ import annotations

from typing import Any

from lm_core.config import to_dict
from lm_core.deepspeed_settings import engine_kind
from lowrank_opt.adamw import AdamW, AdamW8bit
from lowrank_opt.apollo import ApolloAdamW
from lowrank_opt.base import BaseOptimizer, Group
from lowrank_opt.config import TrainConfig
from lowrank_opt.fira import FiraAdamW
from lowrank_opt.galore import GaLoreAdamW, GaLoreAdamW8bit
from lowrank_opt.ldadam import LDAdamW
from lowrank_opt.muon import MuonWithAdamW
from lowrank_opt.optimizer_options import LOW_RANK, OF_LDADAM, PROJECTED, moment_bits
from lowrank_opt.qgalore import QGaLoreAdamW8bit

CLASSES: dict[str, type[BaseOptimizer]] = {
    "baseline": AdamW,
    "adamw8bit": AdamW8bit,
    "galore": GaLoreAdamW,
    "galore8bit": GaLoreAdamW8bit,
    "apollo": ApolloAdamW,
    "apollo-mini": ApolloAdamW,
    "fira": FiraAdamW,
    "qgalore": QGaLoreAdamW8bit,
    "ldadam": LDAdamW,
    "muon": MuonWithAdamW,
    # adapters alone; `lora+...` names the optimizer of the adapters
    "lora": AdamW,
}
# what selects parameters, and what applies to dense parameters as well, is no setting of a low-rank group
_ELSEWHERE = (
    "rank",
    "target_modules",
    "exclude_modules",
    "state_bits",
    "block_size",
    "min_8bit_size",
    "embedding_state_bits",
    "weight_dtype",
)


def make_optimizer(config: TrainConfig, groups: list[Group]) -> BaseOptimizer:
    """The optimizer that `config` names over `groups`, whose low-rank ones carry `low_rank_settings`."""
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "seed": config.seed,
        "stochastic_rounding": config.stochastic_rounding,
        "state_bits": moment_bits(config),
    }
    if moment_bits(config) == 8:
        common |= {"block_size": config.galore.block_size, "min_8bit_size": config.galore.min_8bit_size}
    made: Any = CLASSES[config.optimizer.removeprefix("lora+")]
    return made(groups, **common)  # type: ignore[no-any-return]


def low_rank_settings(config: TrainConfig) -> Group:
    """What the group of low-rank parameters overrides; empty where the optimizer has none."""
    galore, apollo = config.galore, config.apollo
    rank = galore.rank if galore.rank < 1 else int(galore.rank)
    by_rows = {"proj_type": "right"} if engine_kind(config) == "sharded" else {}
    if config.optimizer in PROJECTED:
        # an option that is not given is left to the class
        chosen = {name: value for name, value in to_dict(galore).items() if name not in _ELSEWHERE and value is not None}
        settings = {"rank": rank, **chosen, **by_rows}
        return {**settings, "norm_growth": apollo.apollo_norm_growth} if config.optimizer == "fira" else settings
    if config.optimizer in ("apollo", "apollo-mini"):
        mini = config.optimizer == "apollo-mini"
        return {
            **by_rows,
            "rank": apollo.apollo_rank or (1 if mini else 256),
            "scale": apollo.apollo_scale or (128.0 if mini else 1.0),
            "scale_type": apollo.apollo_scale_type or ("tensor" if mini else "channel"),
            "update_proj_gap": apollo.apollo_update_proj_gap,
            "norm_growth": apollo.apollo_norm_growth,
            "scale_front": apollo.apollo_scale_front,
            "proj_method": apollo.apollo_proj_method,
        }
    if config.optimizer == "ldadam":
        own = {name.removeprefix("ldadam_"): value for name, value in to_dict(config.ldadam).items()}
        shared = {name: value for name in OF_LDADAM if (value := getattr(galore, name)) is not None}
        return {**shared, **own, "rank": rank, "betas": config.ldadam.ldadam_betas}
    # Muon takes its matrices by the mark of a rank, which it does not use
    return {"rank": 1} if config.optimizer in LOW_RANK else {}
