"""What scripts for Megatron and DeepSpeed say in other words than core, and the shipped files of options by name. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

from lm_core.config import config, load, merge, opt
from lm_core.errors import ConfigError
from lm_core.flags import Word
from lm_core.guide import AdamSpellings, Meaning, right

_NAMES = {"quickstart-ar": "ar_140m_quickstart", "quickstart-mdm": "mdm_425m_quickstart", "tiny-cpu": "tiny"}


@config
class MegatronSpellings(AdamSpellings):
    """Further options of such scripts; `words` are flags of theirs where there is nothing to choose here."""

    words: ClassVar[Mapping[str, Word]] = {
        "--data-impl": Word("corpora are mapped into memory", ("mmap",)),
        "--no-pipeline-parallel": Word("--pipeline-model-parallel-size is 1 unless given", ("true",)),
        "--exit-signal-handler": Word("a signal always saves before the run ends", ("true",)),
        "--tensorboard-dir": Word("the run folder holds what TensorBoard reads"),
        "--tensorboard-queue-size": Word("records are written when they are logged"),
        "--log-timers-to-tensorboard": Word("speed is always logged", ("true",)),
        "--log-batch-size-to-tensorboard": Word("samples are always logged", ("true",)),
        "--log-validation-ppl-to-tensorboard": Word("held-out losses are always logged", ("true",)),
        "--wandb-save-dir": Word("the run folder holds wandb/"),
        "--test-data-path-file": Word("mdm-scaling eval loss scores further corpora"),
        "--master-addr": Word("the launcher says where processes meet"),
        "--master-port": Word("the launcher says where processes meet"),
    }

    recipe: str | None = opt(None, "Shipped file of options to begin with, as the first --config: a name in presets/, such as datablation.")
    bf16: bool = opt(False, "The same as --precision bf16.")
    fp16: bool = opt(False, "The same as --precision fp16.")
    fp32: bool = opt(False, "The same as --precision fp32.")
    deepspeed: bool = opt(False, "The same as --engine deepspeed.")
    optimizer: Literal["adam", "adam-torch", "adam-cpu"] = opt(
        "adam",
        "AdamW in one pass over memory, in torch's operations one by one, or DeepSpeed's on the CPU, which means --offload optimizer.",
    )
    cpu_optimizer: bool = opt(False, "The same as --offload optimizer.")
    offload_optimizer: Literal["none", "cpu"] | None = opt(None, "cpu: the same as --offload optimizer.")
    offload_param: Literal["none", "cpu"] | None = opt(None, "cpu: the same as --offload all.")
    recompute: Literal["none", "selective", "full"] | None = opt(
        None, "Recompute in the backward pass: attention alone (selective), or whole layers, which --gradient-checkpointing means, too."
    )
    use_order_list: bool | None = opt(None, "true: --num-order-list of at least 1.")
    wandb_mode: Literal["online", "offline", "disabled"] | None = opt(None, "The same as --wandb, where disabled is off.")

    @classmethod
    def meanings(cls, values: Mapping[str, Any]) -> dict[str, list[Meaning]]:
        found = super().meanings(values)
        for name, meaning in {
            "deepspeed": Meaning("engine", "deepspeed"),
            "cpu_optimizer": Meaning("offload", "optimizer"),
        }.items():
            if right(bool, values.get(name)):
                found[name] = [meaning]
        if values.get("optimizer") == "adam-cpu":
            found["optimizer"] = [Meaning("offload", "optimizer")]
        if values.get("offload_param") == "cpu":
            found["offload_param"] = [Meaning("offload", "all")]
        elif values.get("offload_optimizer") == "cpu":
            found["offload_optimizer"] = [Meaning("offload", "optimizer")]
        if values.get("recompute") in ("none", "full"):
            found["recompute"] = [Meaning("gradient_checkpointing", values["recompute"] == "full")]
        if right(bool, values.get("use_order_list")):
            found["use_order_list"] = [Meaning("num_order_list", max(1, right(int, values.get("num_order_list")) or 0))]
        mode = values.get("wandb_mode")
        if mode in ("online", "offline", "disabled"):
            found["wandb_mode"] = [Meaning("wandb", "off" if mode == "disabled" else mode)]
        return found

    @classmethod
    def further_layers(cls, values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        if "wandb_project" in values and not {"wandb", "wandb_mode"} & set(values):
            # in those scripts a project is what turns reports on
            values = {**values, "wandb_mode": "online"}
        name = values.get("recipe")
        if not isinstance(name, str):
            # none, or one that is refused where all options are checked
            return super().further_layers(values)
        # whatever else is given wins over it
        layer = {path: value for path, value in merge(cls, load(recipe_file(name))).items() if path not in values}
        return [layer, *super().further_layers({**layer, **values})]

    def check(self) -> None:
        if self.use_order_list is False and self.num_order_list:  # type: ignore[attr-defined]
            raise ConfigError(f"use_order_list: false, but there are {self.num_order_list} orders; drop --num-order-list")  # type: ignore[attr-defined]
        if self.offload_optimizer == "none" and self.offload_param == "cpu":
            raise ConfigError("offload_optimizer: none, but parameters in host memory bring the optimizer along; drop one of the two")
        if self.recompute == "selective" and self.gradient_checkpointing:  # type: ignore[attr-defined]
            raise ConfigError("recompute: selective, but --gradient-checkpointing recomputes whole layers; drop one of the two")


def recipe_file(name: str) -> Path:
    """A shipped file of options. Raises ConfigError with the names for one that is not there."""
    folder = Path(str(files("mdm_scaling"))) / "presets"
    known = {file.stem: file for file in folder.glob("*.yaml")}
    if (found := known.get(_NAMES.get(name, name))) is None:
        raise ConfigError(f"recipe: {name!r} is none of {', '.join(sorted([*_NAMES, *known]))}; name one of them, or a file with --config")
    return found
