"""Recurrences of RWKV."""

from kernels_cuda.rwkv_distill.wkv6 import wkv6, wkv6_step
from kernels_cuda.rwkv_distill.wkv7 import wkv7, wkv7_step

__all__ = ["wkv6", "wkv6_step", "wkv7", "wkv7_step"]
