"""Mixtures of experts."""

from kernels_cuda.moe.moe_ffn import moe_ffn

__all__ = ["moe_ffn"]
