"""The recurrences that students use, from the shared operators."""

from kernels_cuda.rwkv_distill import wkv7, wkv7_step

__all__ = ["wkv7", "wkv7_step"]
