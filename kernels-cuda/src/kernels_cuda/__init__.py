"""Fused operators for training language models, each as a C++ twin for CPUs, CUDA kernels and a plain PyTorch reference."""

from kernels_cuda.build import BuildError
from kernels_cuda.choice import CHOICES, use

__version__ = "0.1.0"
__all__ = ["CHOICES", "BuildError", "use"]
