"""Shapes to time, and what they are compared with."""

from kernels_cuda.mdm.noise_cases import shapes
from kernels_cuda.mdm.noise_tokens import noise_tokens, reference
from kernels_cuda.mdm.noise_tokens.cases import make

SHAPES = shapes(make, noise_tokens, reference.noise_tokens)
