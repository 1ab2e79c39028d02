"""Definitions of the recurrences in plain PyTorch, for any float type."""

from kernels_cuda.rwkv_distill.wkv7.reference import wkv7, wkv7_step

__all__ = ["wkv7", "wkv7_step"]
