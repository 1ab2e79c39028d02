"""The shared operators of this method under one roof."""

from kernels_cuda.head import linear_kl
from kernels_cuda.rwkv_distill import tmix_out, tmix_shift, wkv6, wkv6_step, wkv7, wkv7_step

__all__ = ["linear_kl", "tmix_out", "tmix_shift", "wkv6", "wkv6_step", "wkv7", "wkv7_step"]
