"""The table of model sizes, and how many parameters each has. Free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lm_core.errors import ConfigError

# The vocabulary of GPT-2, which nominal counts are defined with whatever the tokenizer of a run
NOMINAL_VOCABULARY = 50257
DIVISIBLE_BY = 128


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA-shaped decoder."""

    layers: int
    hidden: int
    heads: int
    head_size: int
    key_value_heads: int
    ffn: int
    # entries of the vocabulary that the nominal count is made with
    vocabulary: int = NOMINAL_VOCABULARY
    # parts that need not be LLaMA's
    layernorm: bool = False
    swiglu: bool = True
    # rows of a table of learned positions; 0: rotary angles
    positions: int = 0
    bias: bool = False

    @property
    def is_llama(self) -> bool:
        """Whether LLaMA's own class can hold it; biases it has."""
        return self.swiglu and not self.layernorm and not self.positions

    @property
    def nominal(self) -> int:
        """P = 4 L h^2 + 3 L h g + 6 L h + V h with GPT-2's V: the N of every name, FLOP count and law.

        Without a gate the feed-forward layers have two matrices, not three. Learned positions multiply nothing and do not count.

        >>> SIZES["117M"].nominal
        123587328
        """
        h, L = self.hidden, self.layers
        return 4 * L * h * h + self.ffn_matrices * L * h * self.ffn + 6 * L * h + self.vocabulary * h

    @property
    def ffn_matrices(self) -> int:
        return 3 if self.swiglu else 2

    def parts(self, vocabulary: int | None = None, *, tied: bool = True, divisible_by: int = DIVISIBLE_BY) -> dict[str, int]:
        """Trained parameters by part, with an embedding padded for `vocabulary` entries and the mask.

        >>> sum(SIZES["217M"].parts().values())
        217481600
        """
        h, L = self.hidden, self.layers
        rows = padded(vocabulary or self.vocabulary, divisible_by)
        of_heads = (self.heads + 2 * self.key_value_heads) * self.head_size + h if self.bias else 0
        of_ffn = (self.ffn_matrices - 1) * self.ffn + h if self.bias else 0
        return {
            "embedding": rows * h,
            "positions": self.positions * h,
            "attention": L * (h * 2 * (self.heads + self.key_value_heads) * self.head_size + of_heads),
            "ffn": L * (self.ffn_matrices * h * self.ffn + of_ffn),
            "norms": (2 * L + 1) * h * (2 if self.layernorm else 1),
            "head": 0 if tied else rows * h,
        }

    def exact(self, vocabulary: int | None = None, *, tied: bool = True, divisible_by: int = DIVISIBLE_BY) -> int:
        """Number of trained parameters."""
        return sum(self.parts(vocabulary, tied=tied, divisible_by=divisible_by).values())


def padded(vocabulary: int, divisible_by: int = DIVISIBLE_BY) -> int:
    """Rows of the embedding: the vocabulary and the mask, rounded up.

    >>> padded(50257), padded(49152)
    (50304, 49280)
    """
    return -(-(vocabulary + 1) // divisible_by) * divisible_by


def swiglu_width(hidden: int) -> int:
    """Width g of the feed-forward layers: two thirds of 4 h, rounded down to a multiple of 64.

    >>> swiglu_width(768)
    2048
    """
    return int((4 * hidden * 2 / 3) / 64) * 64


def shape(
    layers: int, hidden: int, heads: int, head_size: int, ffn: int | None = None, key_value_heads: int | None = None,
    vocabulary: int = NOMINAL_VOCABULARY, *, layernorm: bool = False, swiglu: bool = True, positions: int = 0, bias: bool = False,
) -> Shape:  # fmt: skip
    """A shape with the widths that are not given as every preset has them; without a gate feed-forward layers are four times as wide."""
    ffn = ffn or (swiglu_width(hidden) if swiglu else 4 * hidden)
    return Shape(layers, hidden, heads, head_size, key_value_heads or heads, ffn, vocabulary, layernorm, swiglu, positions, bias)


# name: hidden / historic feed-forward width (shown, never used) / head size / heads / layers
_TABLE = """
7M 128/512/32/4/3; 14M 224/896/32/7/4; 20M 288/1152/32/7/5; 35M 448/1792/32/7/6; 44M 512/2048/64/8/8; 57M 576/2304/64/9/9;
74M 640/2560/64/10/10; 90M 640/2560/64/10/13; 106M 640/2560/64/10/16; 117M 768/3072/64/12/12; 140M 768/3072/64/12/15;
163M 768/3072/64/12/18; 175M 896/3584/64/14/14; 196M 896/3584/64/14/16; 217M 896/3584/64/14/18; 251M 1024/4096/64/16/16;
278M 1024/4096/64/16/18; 306M 1024/4096/64/16/20; 425M 1280/5120/128/10/18; 489M 1280/5120/128/10/21; 509M 1408/5632/128/11/18;
552M 1280/5120/128/10/24; 587M 1408/5632/128/11/21; 632M 1536/6144/128/12/19; 664M 1408/5632/128/11/24; 724M 1536/6144/128/12/22;
816M 1536/6144/128/12/25; 893M 1792/7168/128/14/20; 1018M 1792/7168/128/14/23; 1143M 1792/7168/128/14/26; 1266M 2048/8192/128/16/22;
1424M 2176/8704/128/17/22; 1429M 2048/8192/128/16/25; 1593M 2048/8192/128/16/28; 1609M 2176/8704/128/17/25; 1731M 2304/9216/128/18/24;
1794M 2176/8704/128/17/28; 2007M 2304/9216/128/18/28; 2283M 2304/9216/128/18/32; 2298M 2560/10240/128/20/26; 2639M 2560/10240/128/20/30;
2980M 2560/10240/128/20/34; 3530M 2688/10752/128/21/36; 3802M 2816/11264/128/22/36; 4084M 2944/11776/128/23/36; 4516M 3072/12288/128/24/36;
6796M 3584/14336/128/28/40; 9293M 4096/16384/128/32/42; 11452M 4352/17408/128/32/47; 12295M 4608/18432/128/36/44;
12569M 4608/18432/128/32/47; 13735M 4864/19456/128/32/47; 14940M 4992/19968/128/32/49; 16183M 5120/20480/128/40/47
"""


def _read(entry: str) -> tuple[str, Shape]:
    name, numbers = entry.split()
    hidden, _, head_size, heads, layers = map(int, numbers.split("/"))
    return name, shape(layers, hidden, heads, head_size)


SIZES: Mapping[str, Shape] = MappingProxyType(dict(_read(entry) for entry in _TABLE.split(";")))
# Small ones for tests, examples and studies on a laptop, with a vocabulary of bytes; not part of the published table
_BYTES = 259
SMALL: Mapping[str, Shape] = MappingProxyType(
    {
        "tiny": shape(2, 64, 4, 16, vocabulary=_BYTES),
        "20k": shape(2, 24, 2, 12, 64, vocabulary=_BYTES),
        "40k": shape(2, 40, 2, 20, 96, vocabulary=_BYTES),
        "80k": shape(3, 48, 3, 16, 128, vocabulary=_BYTES),
        "170k": shape(3, 64, 4, 16, 192, vocabulary=_BYTES),
        "390k": shape(4, 88, 4, 22, 256, vocabulary=_BYTES),
        "900k": shape(5, 120, 5, 24, 320, vocabulary=_BYTES),
    }
)
ALL: Mapping[str, Shape] = MappingProxyType({**SIZES, **SMALL})


def named(name: str) -> Shape:
    """The shape of a preset. Raises ConfigError with the nearest names for an unknown one."""
    if name in ALL:
        return ALL[name]
    near = difflib.get_close_matches(name, ALL, 3, cutoff=0.3)
    raise ConfigError(f"preset: {name!r} is unknown; did you mean {' or '.join(near or ['117M'])}? `mdm-scaling presets list` shows all")
