"""What a beacon model is: `BeaconConfig`, checked whenever one is made and kept under the key `beacon` of config.json. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from lm_core.config import build, config, opt, to_dict
from lm_core.errors import ConfigError

FORMAT_VERSION = 1
MIXES = ("step-random", "instance-random", "mix-random", "sequence", "adapt-X")
LETTERS = ("q", "k", "v", "o", "mlp")


@config
class BeaconConfig:
    """How the context is cut into windows, and how each window becomes memory."""

    window: int = opt(1024, "Raw tokens of a window.", ge=1)
    stride: int = opt(1024, "Raw tokens between the starts of two windows.", ge=1)
    ratio: list[int] = opt([2, 4, 8, 16, 32], "Compression ratios to choose from; 0 keeps a window raw.", min_length=1, ge=0)
    ratio_mix: str = opt("step-random", "How a ratio is chosen in training: step-random, instance-random, mix-random, sequence or adapt-X.")
    inference_ratio_mix: str = opt("adapt-1024", "How a ratio is chosen outside training.")
    attn: Literal["step-expansion", "segmentation", "full-coverage"] = opt("step-expansion", "What a beacon sees of its window.")
    attend_prev: bool = opt(True, "Whether a beacon sees the earlier beacons of its window.")
    sink_size: int = opt(0, "First tokens whose keys and values stay in memory.", ge=0)
    param: list[str] = opt(
        ["q", "k", "v", "o"], "Projections of which beacons have their own copy: q, k, v, o, mlp (up and down).", min_length=1
    )
    pos: Literal["append", "interleave"] = opt("append", "Beacons after their window, or one after every unit.")
    embed_init: Literal["eos", "bos"] = opt("eos", "Token whose embedding the beacon starts from.")
    doc_mask: bool = opt(False, "Documents of one row do not see each other.")
    memory_budget: int | None = opt(None, "Memory entries per row at most, sinks included.", ge=1)
    on_budget: Literal["error", "evict", "adapt"] = opt(
        "error", "When memory outgrows its budget: stop, drop the oldest windows, or choose the ratio for it beforehand."
    )
    on_capacity: Literal["error", "warn", "evict"] = opt(
        "error", "When a text needs more positions than the model has, outside training: stop, go on, or drop the oldest windows."
    )
    prefill_block_windows: int = opt(8, "Windows that are read at once outside training.", ge=1)
    attn_backend: Literal["auto", "eager", "sdpa", "flex"] = opt("auto", "How attention is computed.")
    format_version: int = opt(FORMAT_VERSION, "Version of this layout.")

    def check(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version: {self.format_version} is unknown to this version, which reads {FORMAT_VERSION}; use the version that wrote it"
            )
        if self.stride > self.window:
            raise ConfigError(f"stride: {self.stride} is larger than the window ({self.window}); use a stride of at most {self.window}")
        if self.pos == "interleave" and self.stride != self.window:
            raise ConfigError(
                f"stride: interleaved beacons need a stride equal to the window ({self.window}), not {self.stride}; or use pos append"
            )
        if self.pos == "interleave" and not self.attend_prev and self.attn == "full-coverage":
            raise ConfigError("attn: full-coverage cannot be interleaved with attend_prev false; use step-expansion or segmentation")
        if self.pos == "interleave" and self.attend_prev and self.attn == "segmentation":
            raise ConfigError("attn: segmentation cannot be interleaved with attend_prev true; use step-expansion, or attend_prev false")
        if not self.usable():
            divisors = ", ".join(str(number) for number in range(1, self.stride + 1) if self.stride % number == 0)
            raise ConfigError(f"ratio: none of {self.ratio} divides the stride ({self.stride}); its divisors are {divisors}")
        if self.sink_size > self.stride:
            raise ConfigError(f"sink_size: {self.sink_size} is larger than the stride ({self.stride}); use at most {self.stride}")
        for field in ("ratio_mix", "inference_ratio_mix"):
            if re.fullmatch(r"step-random|instance-random|mix-random|sequence|adapt-\d+", getattr(self, field)) is None:
                raise ConfigError(f"{field}: {getattr(self, field)!r} is unknown; choose {', '.join(MIXES)} (X a number of tokens)")
        if unknown := sorted(set(self.param) - set(LETTERS)):
            raise ConfigError(f"param: {unknown[0]!r} is unknown; choose from {', '.join(LETTERS)}")
        if not {"k", "v"} & set(self.param):
            raise ConfigError(f"param: {self.param} holds neither k nor v, so memory could not learn; add one of them")

        if self.memory_budget is not None and self.memory_budget < (least := self.sink_size + max(map(self.entries, self.usable()))):
            raise ConfigError(f"memory_budget: {self.memory_budget} does not hold the sinks and one compaction; use at least {least}")

    def usable(self) -> list[int]:
        """The ratios that divide the stride, with repetitions; 0 stands for raw."""
        return [ratio for ratio in self.ratio if ratio == 0 or self.stride % ratio == 0]

    def entries(self, ratio: int) -> int:
        """Memory entries of one compaction, sinks aside.

        >>> BeaconConfig(window=8, stride=8, ratio=[2]).entries(2), BeaconConfig(window=8, stride=8, ratio=[2]).entries(0)
        (4, 8)
        """
        return self.stride // ratio if ratio else self.stride

    def beacons(self, ratio: int) -> int:
        """Beacons of one compaction."""
        return self.stride // ratio if ratio else 0

    def compactions(self, length: int, training: bool = False) -> int:
        """C(n), or C_train(n): in training a window that ends with the sequence is not compacted.

        >>> cfg = BeaconConfig(window=4, stride=4, ratio=[2])
        >>> [cfg.compactions(n) for n in (3, 4, 8, 9)], [cfg.compactions(n, training=True) for n in (4, 5, 8, 9)]
        ([0, 1, 2, 2], [0, 1, 1, 2])
        """
        last = length - 1 - self.window if training else length - self.window
        return 0 if last < 0 else last // self.stride + 1

    def capacity(self, ratio: int, positions: int) -> int:
        """Raw tokens that fit into `positions` positions at one ratio: cap(r)."""
        if ratio == 0:
            return positions
        return self.stride * ((positions - self.window - self.sink_size) // (self.stride // ratio)) + self.window - 1

    def held(self, length: int, ratio: int) -> int:
        """Entries of keys and values in a layer once `length` tokens are read at one ratio.

        >>> BeaconConfig(window=4, stride=4, ratio=[2], sink_size=1).held(9, 2)
        6
        """
        count = self.compactions(length)
        sinks = min(self.sink_size, length) if count and ratio else 0
        return sinks + count * self.entries(ratio) + length - count * self.stride

    @property
    def visible_interleave(self) -> bool:
        """Whether raw tokens see the beacons of their own window."""
        return self.pos == "interleave" and self.attend_prev

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BeaconConfig:
        return build(cls, values)

    def changed(self, values: dict[str, Any]) -> BeaconConfig:
        """This configuration with other values, checked again."""
        return build(type(self), {**to_dict(self), **values})


def counted(config: BeaconConfig, length: int) -> int:
    """Targets of one document of `length` tokens that count in training, for ratios above 0."""
    ignored = 0 if config.visible_interleave else config.window
    return max(0, length - 1 - ignored)


def windows(config: BeaconConfig, lengths: Sequence[int]) -> list[int]:
    """Windows per row: 1 if it fits into one, else one more than its compactions in training."""
    return [config.compactions(length, training=True) + 1 for length in lengths]
