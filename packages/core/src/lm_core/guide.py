"""Options that the guides of the original code and of transformers' Trainer write differently, in core's words. Imports no torch.

A configuration that takes one of these classes among its bases reads the further spellings; one of its own adds to `meanings`, and to
`words` what a guide writes where there is nothing to choose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from lm_core.config import config, opt
from lm_core.errors import ConfigError
from lm_core.flags import Word
from lm_core.values import read


class Meaning(NamedTuple):
    """What a spelling of a guide sets: option and value."""

    option: str
    value: Any


@config
class AdamSpellings:
    """Adam's two decay rates, one by one."""

    adam_beta1: float | None = opt(None, "First of --betas.", ge=0, lt=1)
    adam_beta2: float | None = opt(None, "Second of --betas.", ge=0, lt=1)

    @classmethod
    def meanings(cls, values: Mapping[str, Any]) -> dict[str, list[Meaning]]:
        """By spelling among `values` (as they were written): what it sets."""
        rates = {name: right(float, values.get(name)) for name in ("adam_beta1", "adam_beta2")}
        given = [name for name, rate in rates.items() if rate is not None]
        default = cls.__dataclass_fields__["betas"].default
        pair = tuple(base if rate is None else rate for rate, base in zip(rates.values(), default, strict=True))
        return {given[0]: [Meaning("betas", pair)]} if given else {}

    @classmethod
    def further_layers(cls, values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """What the spellings mean, as one more layer of values."""
        return [{option: value for parts in cls.meanings(values).values() for option, value in parts}]

    def check(self) -> None:
        """Raises ConfigError where a spelling and what it stands for say different things."""
        values = {field: getattr(self, field) for field in self.__dataclass_fields__}
        for name, parts in self.meanings(values).items():
            for option, value in parts:
                if (own := values[option]) != value and not (option == "wandb" and own == "offline"):
                    raise ConfigError(f"{name}: {values[name]} means {option} {value}, but {option} is {own}; drop one of the two")


@config
class TrainerSpellings(AdamSpellings):
    """What transformers' Trainer calls arithmetic and reports, too."""

    words: ClassVar[Mapping[str, Word]] = {
        "--do-train": Word("this command trains", ("true",)),
        "--optim": Word("AdamW is the optimizer", ("adamw_torch", "adamw_torch_fused", "adamw_hf")),
        "--logging-strategy": Word("--log-every counts steps", ("steps",)),
        "--dataloader-pin-memory": Word("batches are copied as the device wants them"),
        "--ddp-timeout": Word("the launcher's environment says how long processes wait"),
        "--ddp-find-unused-parameters": Word("every trained weight takes part in every step", ("false",)),
        "--log-level": Word("warnings are always shown, notices unless --quiet is given"),
        "--log-level-replica": Word("further processes show warnings alone"),
        "--log-on-each-node": Word("the first process writes the log", ("false",)),
    }
    bf16: bool | None = opt(None, "--precision bf16; false needs another --precision.")
    fp16: bool | None = opt(None, "--precision fp16; false needs another --precision.")
    report_to: list[Literal["wandb", "tensorboard", "none"]] = opt(
        help="--wandb online, --tensorboard; whichever is not named is off.", factory=list
    )

    @classmethod
    def meanings(cls, values: Mapping[str, Any]) -> dict[str, list[Meaning]]:
        found = super().meanings(values)
        for name in ("bf16", "fp16"):
            if right(bool, values.get(name)):
                found[name] = [Meaning("precision", name)]
        if named := right(list[str], values.get("report_to")):
            named = [word.strip() for words in named for word in words.split(",")]
            found["report_to"] = [Meaning("tensorboard", "tensorboard" in named), Meaning("wandb", "online" if "wandb" in named else "off")]
        return found

    def check(self) -> None:
        for name in ("bf16", "fp16"):
            if getattr(self, name) is False and self.precision == name:  # type: ignore[attr-defined]
                raise ConfigError(f"{name}: false, but --precision is {name}; give another one, such as fp32")


def right(kind: Any, value: Any) -> Any:
    """`value`, as it was written, read as `kind`; None where there is none, or a wrong one, which is reported where it is read."""
    if value is None:
        return None
    found, wrong = read(kind, {}, value, "")
    return None if wrong else found
