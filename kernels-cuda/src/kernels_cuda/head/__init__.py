"""Losses of the output head, computed without ever holding all logits."""

from kernels_cuda.head.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
