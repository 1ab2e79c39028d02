"""Recurrences of RWKV and the element-wise stages around them."""

from kernels_cuda.rwkv_distill.tmix_out import tmix_out
from kernels_cuda.rwkv_distill.tmix_shift import tmix_shift
from kernels_cuda.rwkv_distill.wkv6 import wkv6, wkv6_step
from kernels_cuda.rwkv_distill.wkv7 import wkv7, wkv7_step

__all__ = ["tmix_out", "tmix_shift", "wkv6", "wkv6_step", "wkv7", "wkv7_step"]
