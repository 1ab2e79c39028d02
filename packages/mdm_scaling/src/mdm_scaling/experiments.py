"""Perturbations of training that ask what the two objectives owe to which tokens they see; all are off in evaluations.

B sequences, S positions. Every draw has the sample's address, so layouts and restarts change nothing; at their neutral
values nothing is drawn and nothing differs, bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from kernels_cuda.mdm import token_mask_keep
from lm_core import counter
from mdm_scaling.noise import WHOLE, at, unit, words

RandmaskMode = Literal["attention", "column", "input"]
# lanes of a sample's word in the stream order
SUFFIX, ORDER = 0, 1


def suffixes(masked_BS: Tensor, eligible_BS: Tensor, ratio: float, seed: int, index_B: Tensor) -> tuple[Tensor, Tensor]:
    """Left-to-right masking: (masks, which sequences changed). With probability `ratio` a mask becomes the suffix of the same length."""
    chosen_B = unit(words(seed, "order", index_B, WHOLE, 4)[:, SUFFIX]) < ratio
    from_end_BS = eligible_BS.flip(1).cumsum(1).flip(1)
    suffix_BS = eligible_BS & (from_end_BS <= masked_BS.sum(1, keepdim=True))
    return torch.where(chosen_B[:, None], suffix_BS, masked_BS), chosen_B


def replaced(ids_BS: Tensor, ratio: float, mask_id: int, seed: int, index_B: Tensor) -> Tensor:
    """Token masking of mode input: each input token becomes the mask with probability `ratio`."""
    return ids_BS.masked_fill(unit(words(seed, "mask", index_B, 0, ids_BS.shape[1])) < ratio, mask_id)


def seen(mode: Literal["attention", "column"], size: int, ratio: float, eps: float, seed: int, index_B: Tensor) -> Tensor:
    """Who sees whom under token masking (B x 1 x S queries x S keys, bool): the past, less what is hidden, and oneself always.

    attention: a query is selected with probability `ratio` and then hides each earlier key with probability
    p = eps + (1 - eps) u of its own; column: a selected key is hidden from every query but its own.
    """
    place, number = torch.arange(size, device=index_B.device), counter.number("mask")
    # a few queries at a time: the draws of their pairs stay in a cache
    parts = place.split(max(1, 2**16 // size))
    rows = [[token_mask_keep(seed, number, slot, part[:, None], place, size, ratio, eps, mode) for part in parts] for slot in index_B]
    return torch.stack([torch.cat(of_sequence) for of_sequence in rows])[:, None]


@lru_cache(maxsize=8)
def orders(count: int, size: int, predefined: bool, seed: int) -> Tensor:
    """Permutations of 0 .. size-1 (count x size): the identity first, then uniform ones.

    predefined: order i sorts a + i z for one standard normal vector z, so that inversions never fall as i grows.
    """
    place = torch.arange(size)
    if predefined:
        z = counter.normal(seed, "order", -1, size).double()
        return torch.stack([torch.argsort(place + i * z, stable=True) for i in range(count)])
    drawn = [torch.argsort(counter.bits(seed, "order", -1 - i, size), stable=True) for i in range(1, count)]
    return torch.stack([place, *drawn])


def reordered(ids_BS: Tensor, labels_BS: Tensor, table: Tensor, seed: int, index_B: Tensor) -> tuple[Tensor, ...]:
    """Next-token prediction in another order: (inputs, labels, positions of the inputs, positions of the labels), B x S each.

    Of the S + 1 tokens of a sequence the first stays; each sequence draws one order.
    """
    draw = at(seed, "order", index_B, torch.full_like(index_B, ORDER), WHOLE)
    order_BS = table.to(ids_BS.device)[draw * len(table) >> 32]
    targets = labels_BS.gather(1, order_BS)
    inputs = torch.cat([ids_BS[:, :1], targets[:, :-1]], dim=1)
    positions = torch.cat([torch.zeros_like(order_BS[:, :1]), order_BS[:, :-1] + 1], dim=1)
    return inputs, targets, positions, order_BS + 1


def documents(ids_BS: Tensor, end: int, causal: bool, own_mask: bool, own_positions: bool) -> dict[str, Tensor]:
    """What keeps the documents of a sequence apart; each ends with the token `end`.

    own_mask: nobody sees another document; own_positions: each one counts from 0. Positions never come without a mask, since
    those that start again would be taken for packed documents.
    """
    place, ends_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device), ids_BS == end
    # an end token belongs to the document that it ends
    number_BS = ends_BS.cumsum(1) - ends_BS.long()
    sees = number_BS[:, :, None] == number_BS[:, None, :] if own_mask else torch.ones_like(ids_BS[:, :, None] == ids_BS[:, None, :])
    found = {"attention_mask": (sees & (place <= place[:, None]) if causal else sees)[:, None]}
    if own_positions:
        begins = torch.cat([torch.ones_like(ends_BS[:, :1]), ends_BS[:, :-1]], dim=1)
        found["position_ids"] = place - torch.where(begins, place, 0).cummax(1).values
    return found


def causal(batch: int, size: int, device: torch.device) -> Tensor:
    """The past and oneself (B x 1 x S x S, bool), for calls whose positions are out of order."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril().expand(batch, 1, size, size)
