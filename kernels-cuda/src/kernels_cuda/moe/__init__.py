"""Mixtures of experts."""

from kernels_cuda.moe.moe_ffn import moe_ffn
from kernels_cuda.moe.noisy_load import noisy_load
from kernels_cuda.moe.route import route

__all__ = ["moe_ffn", "noisy_load", "route"]
