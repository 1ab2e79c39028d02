"""Losses of the output head, computed without ever holding all logits."""

from kernels_cuda.head.linear_cross_entropy import linear_cross_entropy
from kernels_cuda.head.linear_kl import linear_kl

__all__ = ["linear_cross_entropy", "linear_kl"]
