"""Attention that evaluates who sees whom inside its kernel: on a GPU no tensor of B x S x S exists under token masking.

On a CPU, where Flex has no backward, training takes the same masks as tensors. B sequences, H heads, S positions, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kernels_cuda.mdm import token_mask_keep
from kernels_cuda.mdm.noise_tokens.reference import philox, unit
from lm_core import counter

# what a config calls this attention
NAME = "mdm_flex"
BLOCK = 128
# (sequence, head, query, key) -> whether the query sees the key
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def token_mask(mode: Any, size: int, ratio: float, eps: float, seed: int, index_B: Tensor) -> BlockMask:
    """The masks of `experiments.seen` as a function of their places."""
    stream = counter.number("mask")

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return token_mask_keep(seed, stream, index_B[b], q, k, size, ratio, eps, mode)

    return past(sees, size, index_B.device)


def past(sees: Sees, size: int, device: torch.device) -> BlockMask:
    """Blocks of keys up to each query's own, of all of which `sees` is asked."""
    count = -(-size // BLOCK)
    number = torch.arange(count, dtype=torch.int32, device=device)
    return BlockMask.from_kv_blocks(
        (number + 1)[None, None], number.expand(1, 1, count, count).contiguous(), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(size, size)
    )


def attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float | None, dropout: float, seed: Tensor) -> Tensor:
    """softmax, dropout, values (B x H x S x D). Flex has no dropout: what is left of a row is weighed by its share of the whole.

    out = flex(kept keys) exp(lse_kept - lse_all) / (1 - p), and 0 where no key is kept. The pair (query, key) of a sequence's head
    keeps its place by a draw at (`seed`, dropout, number of the head).
    """
    flex = _flex(query.device.type)
    run = partial(
        flex, query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1], return_aux=AuxRequest(lse=True)
    )  # fmt: skip
    if not dropout:
        return cast(Tensor, run(block_mask=mask)[0])
    sees, heads, size, stream = mask.mask_mod, query.shape[1], query.shape[2], counter.number("dropout")

    def kept(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(b, h, q, k) & (drawn(seed, stream, b * heads + h, q * size + k) >= dropout)

    out, lse_kept = run(block_mask=past(kept, size, query.device))
    lse = run(block_mask=mask)[1].lse
    none = lse_kept.lse.isneginf()
    share = torch.exp(lse_kept.lse.masked_fill(none, 0.0) - lse).masked_fill(none, 0.0)
    return cast(Tensor, out * (share / (1 - dropout))[..., None].to(out.dtype))


def drawn(seed: Tensor, stream: int, number: Tensor, element: Tensor) -> Tensor:
    """Uniforms in [0, 1) of elements below 2^34."""
    element = element.long()
    words = philox(number.long(), element >> 2, stream, seed)
    lane = element & 3
    return unit(torch.where(lane < 2, torch.where(lane == 0, words[0], words[1]), torch.where(lane == 2, words[2], words[3])))


@cache
def _flex(device: str) -> Any:
    # plain operations serve where there is no kernel to compile
    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def _forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0, scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What layers call: this attention under a function, torch's own under anything else."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
    # from torch's generator, which is seeded per micro-batch, apart per tensor-parallel rank, and set back when a layer is recomputed
    seed = torch.randint(2**62, ()).to(query.device) if dropout else torch.zeros((), dtype=torch.int64)
    out = attention(query, key, value, attention_mask, scale=scaling, dropout=dropout, seed=seed)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
