"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda.mdm.noise_tokens.reference import philox


def reveal_tokens(
    logits: Tensor, valid_vocab: int, temperature: float, top_k: int, top_p: float, key: int, stream: int, slot: Tensor, pos: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See the public function of the same name."""
    values = logits[:, :valid_vocab].double()
    if temperature == 0:
        token = values.argmax(-1)
    else:
        weights = ((values - values.amax(-1, keepdim=True)) / temperature).exp()
        token = _drawn(_likeliest(weights, values, top_k, top_p), _uniform(key, stream, slot, pos))
    logprob = values.log_softmax(-1).gather(1, token[:, None])[:, 0]
    return token, logprob.float(), logprob.exp().float()


def _likeliest(weights: Tensor, values: Tensor, top_k: int, top_p: float) -> Tensor:
    """`weights` of the tokens that the restrictions leave, 0 elsewhere."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    total = weights.gather(1, order).cumsum(-1)
    before = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], dim=1)
    kept = torch.ones_like(before, dtype=torch.bool) if top_p == 1 else before < top_p * total[:, -1:]
    if top_k:
        kept[:, top_k:] = False
    return weights * torch.zeros_like(kept).scatter_(1, order, kept)


def _uniform(key: int, stream: int, slot: Tensor, pos: Tensor) -> Tensor:
    first, second, *_ = philox(slot, pos, stream, key)
    return ((first >> 5) * 2**26 + (second >> 6)).double() * 2.0**-53


def _drawn(weights: Tensor, u: Tensor) -> Tensor:
    """The first id at which the sum of weights is above the share u of the whole."""
    passed = weights.cumsum(-1)
    # rounding may leave nothing above the whole
    last = (weights > 0).int().cumsum(-1).argmax(-1)
    return (passed <= u[:, None] * passed[:, -1:]).sum(-1).minimum(last)
