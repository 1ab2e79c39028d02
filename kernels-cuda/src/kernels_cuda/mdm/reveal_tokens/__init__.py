"""Tokens for masked places, drawn or the likeliest, with what the model thinks of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.mdm.reveal_tokens import binding, reference

__all__ = ["reveal_tokens"]


def reveal_tokens(
    logits: Tensor,
    valid_vocab: int,
    temperature: float,
    top_k: int,
    top_p: float,
    key: int,
    stream: int,
    slot: Tensor,
    pos: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token, its log-probability, its probability) for each row of `logits` (M x V); ids from `valid_vocab` on are never chosen.

    Temperature 0 takes the likeliest token, the lowest id on ties. Above it a token is drawn from softmax(logits / temperature),
    restricted to the `top_k` likeliest (0: all) and to those before which the likelier ones have less than `top_p` of the whole (1: all);
    of equal logits the lower id comes first. Both probabilities are the plain model's, at temperature 1 and without restriction.

    logits: float32, bfloat16 or float64, with a finite number in every row; slot and pos: M addresses each (int64), pos below 2^31.
    The draw is u in [0, 1) with 53 bits, from lanes 0 and 1 of word `pos` at (key, slot, stream), and picks where the sum of
    probabilities in the order of ids, in float64, passes u. So a token depends on its row and its address alone.
    token is int64, the others are float32.

    Raises ValueError for shapes, dtypes, devices or settings that do not fit, and on a CPU for a place out of range.

    >>> logits, address = torch.tensor([[0.0, 2.0, 2.0, 9.0]]), torch.tensor([7])
    >>> token, logprob, confidence = reveal_tokens(logits, 3, 0.0, 0, 1.0, key=0, stream=0, slot=address, pos=address)
    >>> int(token), round(float(confidence), 4)
    (1, 0.4683)
    """
    check.dtype("logits", logits, (torch.float32, torch.bfloat16, torch.float64))
    check.dtype("slot", slot, (torch.int64,))
    check.dtype("pos", pos, (torch.int64,))
    check.shapes(logits=(logits, "MV"), slot=(slot, "M"), pos=(pos, "M"))
    check.same("device", logits=logits, slot=slot, pos=pos)
    if not 1 <= valid_vocab <= logits.shape[1]:
        check.fail("valid_vocab", valid_vocab, f"is no number of columns of {logits.shape[1]}", f"use 1 to {logits.shape[1]}")
    if not 0 <= temperature < math.inf:
        check.fail("temperature", temperature, "divides no logits", "use 0 for the likeliest token, or more")
    if top_k < 0:
        check.fail("top_k", top_k, "is no number of tokens", "use 0 for all, or more")
    if not 0 < top_p <= 1:
        check.fail("top_p", top_p, "is no share of the probability", "use a number above 0, at most 1")
    if pos.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (pos < 0) | (pos >= 2**31)
        if bool(wrong.any()):
            check.fail("pos", int(pos[wrong][0]), "is no word of a sample's places", f"use 0 to {2**31 - 1}")
    library = choice.library(binding.OP, logits.device.type)
    if not library or len(logits) == 0:
        return reference.reveal_tokens(logits, valid_vocab, temperature, top_k, top_p, key, stream, slot, pos)
    token, logprob, confidence = (torch.empty(len(logits), dtype=kind, device=logits.device) for kind in binding.OUTPUTS)
    getattr(torch.ops, library).reveal(
        logits.contiguous(), slot.contiguous(), pos.contiguous(), token, logprob, confidence, valid_vocab, temperature, top_k, top_p, key, stream
    )  # fmt: skip
    return token, logprob, confidence
