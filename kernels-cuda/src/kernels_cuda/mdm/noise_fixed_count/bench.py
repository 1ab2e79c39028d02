"""Shapes to time, and what they are compared with."""

from kernels_cuda.mdm.noise_cases import shapes
from kernels_cuda.mdm.noise_fixed_count import noise_fixed_count, reference
from kernels_cuda.mdm.noise_fixed_count.cases import make

SHAPES = shapes(make, noise_fixed_count, reference.noise_fixed_count)
