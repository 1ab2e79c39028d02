"""The experts of each token, their scores, and how they share the tokens. T tokens, N experts, K of them for a token."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kernels_cuda import choice
from kernels_cuda.moe import gates
from kernels_cuda.moe.route import binding, reference

__all__ = ["Route", "route"]


class Route(NamedTuple):
    """What `route` returns."""

    idx_TK: Tensor
    score_TK: Tensor
    count_N: Tensor
    importance_N: Tensor


def route(logits_TN: Tensor, k: int, mask_T: Tensor | None = None, softmax: bool = True) -> Route:
    """The k largest logits of each token, in descending order and ties to the lower expert.

    idx (T x K, int32), score (T x K: the softmax of those k logits, or with `softmax` False the logits), count (N, int32: tokens of each
    expert) and importance (N: the sum of the scores that tokens give it). Tokens where `mask_T` is 0 are routed and count nothing.
    logits_TN is float32, or float64 (always computed by the reference, as more than 256 experts or a k above 16 are); score and importance
    have its dtype and are differentiable. Sums have a fixed order. A NaN comes before all numbers, so that it is seen.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for a k that is not from 1 to N.

    >>> import torch
    >>> found = route(torch.tensor([[0.0, 1, 2, 3], [3, 2, 1, 0]]), 2)
    >>> found.idx_TK.tolist(), found.count_N.tolist(), [round(value, 4) for value in found.importance_N.tolist()]
    ([[3, 2], [0, 1]], [1, 1, 1, 1], [0.7311, 0.2689, 0.2689, 0.7311])
    """
    gates.check_rows(k, mask_T, logits_TN.shape[-1], logits=logits_TN)
    tokens, experts = logits_TN.shape
    if logits_TN.element_size() == 8 or not tokens or not gates.fits(k, experts) or not choice.library(binding.OP, logits_TN.device.type):
        return Route(*reference.route(logits_TN, k, mask_T, softmax))
    score_TK, importance_N, idx_TK, count_N = binding.forward(logits_TN, gates.bits(mask_T), k, softmax)
    return Route(idx_TK, score_TK, count_N, importance_N)
