"""Which tokens are masked: a function of (seed, stream, sample), the same under every layout, batch size and restart.

B sequences, S positions. Draws come from core's counter: word s >> 2 of a sample serves position s, words from 2^31 up
serve the whole sequence (its noise level, its length), further ones the order of the levels in a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels_cuda.mdm import masked_count, masked_tokens
from lm_core import counter

WHOLE = 2**31  # first word beyond those of positions
LEVEL, SHIFT, CUT, LENGTH = range(4)  # lanes of that word

TSampling = Literal["stratified", "shift", "iid"]


@dataclass(frozen=True)
class Noise:
    """How many tokens are masked at noise level t, and what a masked one weighs."""

    mode: Literal["bernoulli", "fixed-count"] = "bernoulli"
    eps: float = 1e-3
    weight: Literal["elbo", "uniform"] = "elbo"
    max_weight: float | None = None


def words(seed: int, stream: str, index_B: Tensor, first: int, size: int) -> Tensor:
    """32-bit draws (B x size, int64) from word `first` of each sample on."""
    index = index_B.to(torch.int64).view(-1, 1)
    blocks = first + torch.arange((size + 3) // 4, dtype=torch.int64, device=index.device)
    low, high = index & 0xFFFFFFFF, (index >> 32) & 0xFFFFFFFF
    drawn = counter.philox((blocks * 0 + low, blocks * 0 + high, blocks + 0 * low, counter.number(stream)), counter.halves(seed))
    return torch.stack(torch.broadcast_tensors(*drawn), dim=-1).flatten(-2)[:, :size]


def at(seed: int, stream: str, index_B: Tensor, element_B: Tensor, first: int = 0) -> Tensor:
    """One 32-bit draw per sample (B): its element `element_B`, counted from word `first`."""
    index, block = index_B.to(torch.int64), first + (element_B.to(torch.int64) >> 2)
    low, high = index & 0xFFFFFFFF, (index >> 32) & 0xFFFFFFFF
    drawn = counter.philox((low, high, block, counter.number(stream)), counter.halves(seed))
    return torch.stack(torch.broadcast_tensors(*drawn), dim=-1).gather(1, (element_B.to(torch.int64) & 3)[:, None])[:, 0]


def signed(seed: int) -> int:
    """The key of a compiled operator, of which the halves count and not the sign."""
    return seed if seed < 2**63 else seed - 2**64


def unit(draws: Tensor) -> Tensor:
    """Draws as float64 in [0, 1)."""
    return (draws >> 8).to(torch.float64) * 2.0**-24


def levels(how: TSampling, seed: int, stream: str, step: int, slot_B: Tensor, index_B: Tensor, count: int) -> Tensor:
    """Noise levels t in [0, 1) (B, float64) of the sequences in these slots of a step that has `count` of them.

    stratified: t = (perm(j) + u_j) / count, one level in every stratum; shift: (u + j / count) mod 1; iid: u_j.
    """
    drawn = unit(words(seed, stream, index_B, WHOLE, 4)[:, LEVEL])
    if how == "iid":
        return drawn
    of_step = torch.tensor([step], device=index_B.device)
    if how == "shift":
        return (unit(words(seed, stream, of_step, WHOLE, 4)[:, SHIFT]) + slot_B.double() / count) % 1.0
    order = torch.argsort(words(seed, stream, of_step, WHOLE + 1, count)[0], stable=True)
    return (order[slot_B].double() + drawn) / count


def masks(noise: Noise, t_B: Tensor, eligible_BS: Tensor, seed: int, stream: str, index_B: Tensor) -> tuple[Tensor, Tensor]:
    """Masked positions (B x S, bool) at levels `t_B`, and what each masked token of a sequence weighs (B, float32).

    bernoulli: an eligible token is masked with probability p = eps + (1 - eps) t and weighs 1/p.
    fixed-count: exactly k = max(1, ceil(t n)) of the n eligible tokens are masked and weigh n/k.
    """
    key, number, size = signed(seed), counter.number(stream), eligible_BS.shape[1]
    if noise.mode == "fixed-count":
        num_B = eligible_BS.sum(1)
        k_B = torch.clamp(torch.ceil(t_B * num_B), min=1).long().minimum(num_B)
        masked = masked_count(k_B.int(), key, number, index_B, size, eligible_BS)
        weight = num_B.double() / k_B.clamp(min=1)
    else:
        p_B = (noise.eps + (1 - noise.eps) * t_B).float()
        masked = masked_tokens(p_B, key, number, index_B, size, eligible_BS)
        weight = 1 / p_B.double()
    if noise.weight == "uniform":
        weight = torch.ones_like(weight)
    if noise.max_weight is not None:
        weight = weight.clamp(max=noise.max_weight)
    return masked, weight.float()


def lengths(ratio: float, seed: int, stream: str, index_B: Tensor, size: int) -> Tensor:
    """Lengths (B) of which the share `ratio` is uniform on 1 .. size and the rest is `size`."""
    drawn = words(seed, stream, index_B, WHOLE, 4)
    cut = unit(drawn[:, CUT]) < ratio
    return torch.where(cut, 1 + (drawn[:, LENGTH] * size >> 32), torch.full_like(drawn[:, LENGTH], size))
