"""LoRA on a mixture: attention by peft's layers, experts by peft's adapters of stacked tensors, routers trained in full."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lm_core.errors import ConfigError
from lm_core.models import lora, using_peft
from moe_cpt.model import LlamaMoEForCausalLM

logger = logging.getLogger(__name__)

# names of a dense feed-forward layer -> the stacked tensor that holds them
STACKED = {"gate_proj": "mlp.experts.gate_up_proj", "up_proj": "mlp.experts.gate_up_proj", "down_proj": "mlp.experts.down_proj"}


def adapted(
    model: LlamaMoEForCausalLM,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    trainable: Sequence[str],
    modules_to_save: Sequence[str] = (),
    freeze_router: bool = False,
) -> Any:
    """A PeftModel: `model` frozen but for adapters of what `trainable` names, the routers, and `modules_to_save`.

    Raises ConfigError for names that match nothing. peft knows no dropout in front of stacked tensors: it acts on the others alone.
    """
    modules, parameters = targets_of(model, trainable)
    saved = [*modules_to_save, *(["router"] if model.config.has_router and not freeze_router else [])]
    require_modules(model, modules_to_save, "modules_to_save")
    if parameters and dropout:
        logger.info("lora_dropout: %g acts on %s, not on the experts", dropout, ", ".join(modules) or "nothing else")
    wrapped = lora(
        model,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0 if parameters else dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=saved or None,
    )
    if parameters and dropout:
        set_dropout(wrapped, dropout)
    return wrapped


def targets_of(model: LlamaMoEForCausalLM, trainable: Sequence[str]) -> tuple[list[str], list[str]]:
    """Linear layers, and stacked tensors, that `trainable` names; those of a feed-forward layer mean the experts and the shared ones."""
    modules, parameters = list[str](), list[str]()
    for name in trainable:
        if name not in STACKED:
            modules.append(name)
            continue
        parameters += [STACKED[name]] if STACKED[name] not in parameters else []
        inner = "shared_experts." + STACKED[name].rpartition(".")[2]
        modules += [inner] if model.config.num_shared_experts and inner not in modules else []
    require_modules(model, modules, "trainable")
    return modules, parameters


def require_modules(model: nn.Module, names: Sequence[str], field: str) -> None:
    """Raise ConfigError with all names that no module of the model ends in."""
    linear = field == "trainable"
    known = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) or not linear]
    if absent := [name for name in names if not any(found == name or found.endswith("." + name) for found in known)]:
        usable = ", ".join(dict.fromkeys([*(name.rpartition(".")[2] for name in known if "mlp" not in name and name), *STACKED]))
        raise ConfigError(f"{field}: the model has no {', '.join(absent)}; choose from {usable}")


def set_dropout(model: nn.Module, dropout: float) -> None:
    """Put dropout in front of the adapters of linear layers."""
    for part in model.modules():
        layers = getattr(part, "lora_dropout", None)
        # a stacked tensor's adapter lies around a whole module of experts
        if isinstance(layers, nn.ModuleDict) and isinstance(part.get_base_layer(), nn.Linear):  # type: ignore[operator]
            for name in layers:
                layers[name] = nn.Dropout(dropout)


def from_adapter(model: LlamaMoEForCausalLM, folder: Path) -> Any:
    """`model` with the adapter of an earlier run, to be trained on."""
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"peft_path: {folder} holds no adapter_config.json; name the final/ folder of a run with --mode lora")
    with using_peft() as peft:
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
