"""Random numbers with an address: Philox4x32-10 keyed by (seed, stream, index), the same bits on every rank, device and restart.

Layout (kernels follow it too): the key is the two halves of the 64-bit seed, low first; the counter is (index low,
index high, element // 4, stream number); element e is lane e % 4 of that block. A uniform is (x >> 8) * 2^-24. A normal
comes from Box-Muller over the uniforms of lanes (0, 1) and (2, 3), the first of which is moved to (x >> 8 + 1) * 2^-24
so that its logarithm is finite.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

# The one list of stream numbers: a new consumer of randomness takes the next free number, and no number is reused.
STREAMS: dict[str, int] = {
    "noise": 0,  # per-token noise of a method's inputs
    "dropout": 1,  # also the seed of torch's own generator
    "order": 2,  # permutations of documents and samples
    "mask": 3,  # per-token choices, such as attention or loss masks
    "eval": 4,  # draws made while evaluating
    "sampling": 5,  # text generation
    "mix": 6,  # which source a sample comes from
    "synthetic": 7,  # made-up corpora
    "init": 8,  # weights and other initial values
    "gate": 9,  # routing noise
    "ratio": 10,  # compression ratios
    "split": 11,  # partitions of neurons, rows or parameters
    "projection": 12,  # random bases and sketches
    "rounding": 13,  # stochastic rounding
}

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Four 32-bit words for a 128-bit counter and a 64-bit key.

    Words are Python ints, or numpy uint64 or torch int64 arrays that broadcast, with values below 2^32.
    A 64-bit product may wrap in int64: its two masked halves are the same bits either way.

    >>> [f"{word:08x}" for word in philox((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = ((second >> 32) & _LOW) ^ b ^ k0, second & _LOW, ((first >> 32) & _LOW) ^ d ^ k1, first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return a, b, c, d


def halves(value: int) -> tuple[int, int]:
    """The low and the high 32 bits of a value taken modulo 2^64.

    >>> halves(2**32 + 5)
    (5, 1)
    """
    return value & _LOW, (value >> 32) & _LOW


def number(stream: str | int) -> int:
    """The number of a stream given by name; a number passes through."""
    return STREAMS[stream] if isinstance(stream, str) else stream


def bits(seed: int, stream: str | int, index: int | Sequence[int] | Tensor, size: int, device: torch.device | str | None = None) -> Tensor:
    """32 random bits per element as int64 in [0, 2^32): shape (size,) for an int `index`, else (len(index), size).

    >>> bits(0, 0, 0, 2).tolist() == [0x6627E8D5, 0xE169C58D]
    True
    """
    if isinstance(index, int):
        return _blocks(seed, stream, *halves(index), size, torch.device(device or "cpu"))
    # Unsigned 64-bit indices arrive as their signed twins; masking gives the same halves.
    at = index if isinstance(index, Tensor) else torch.tensor(index, dtype=torch.int64)
    at = at.to(device=device if device is not None else at.device, dtype=torch.int64).view(-1, 1)
    return _blocks(seed, stream, at & _LOW, (at >> 32) & _LOW, size, at.device)


def _blocks(seed: int, stream: str | int, low: int | Tensor, high: int | Tensor, size: int, device: torch.device) -> Tensor:
    blocks = torch.arange((size + 3) // 4, dtype=torch.int64, device=device)
    words = philox((blocks * 0 + low, blocks * 0 + high, blocks, number(stream)), halves(seed))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :size]


def uniform(
    seed: int, stream: str | int, index: int | Sequence[int] | Tensor, size: int, device: torch.device | str | None = None
) -> Tensor:
    """Uniforms in [0, 1), float32: shape (size,) for an int `index`, else (len(index), size).

    >>> uniform(0, 0, 0, 1).item() == (0x6627E8D5 >> 8) * 2.0**-24
    True
    """
    return (bits(seed, stream, index, size, device) >> 8).to(torch.float32) * 2.0**-24


def normal(
    seed: int, stream: str | int, index: int | Sequence[int] | Tensor, size: int, device: torch.device | str | None = None
) -> Tensor:
    """Standard normals, float32, computed in float64: shape (size,) for an int `index`, else (len(index), size).

    >>> normal(0, "init", 3, 5).shape
    torch.Size([5])
    """
    words = bits(seed, stream, index, (size + 3) // 4 * 4, device) >> 8
    radius = torch.sqrt(-2 * torch.log((words[..., 0::2] + 1).double() * 2.0**-24))
    angle = (2 * math.pi * 2.0**-24) * words[..., 1::2].double()
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(-2)[..., :size].to(torch.float32)


def derive(seed: int, stream: str | int, *address: int) -> int:
    """A 64-bit seed for the given address under `seed`: one Philox block per pair of numbers.

    >>> derive(0, "order", 1, 2) != derive(0, "order", 2, 1)
    True
    """
    for first, second in zip_longest(address[0::2], address[1::2], fillvalue=0):
        words = philox((*halves(first), second & _LOW, number(stream)), halves(seed))
        seed = words[0] | words[1] << 32
    return seed


def reseed(seed: int, step: int, position: int, rank: int) -> None:
    """Seed torch's generators (CPU, and CUDA where it is in use) for micro-batch `position` of `step` on `rank`."""
    value = derive(seed, "dropout", step, position, rank)
    # torch.manual_seed would also queue a call, with a formatted stack, for every device that is not in use
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
