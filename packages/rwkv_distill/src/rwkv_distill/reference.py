"""Definitions of the operators in plain PyTorch, for any float type."""

from kernels_cuda.head.linear_kl.reference import linear_kl
from kernels_cuda.rwkv_distill.tmix_out.reference import tmix_out
from kernels_cuda.rwkv_distill.tmix_shift.reference import tmix_shift
from kernels_cuda.rwkv_distill.wkv6.reference import wkv6, wkv6_step
from kernels_cuda.rwkv_distill.wkv7.reference import wkv7, wkv7_step

__all__ = ["linear_kl", "tmix_out", "tmix_shift", "wkv6", "wkv6_step", "wkv7", "wkv7_step"]
