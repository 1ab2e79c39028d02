"""Memory of beacon models: keys that move to other positions."""

from kernels_cuda.beacon.rope_gather import rope_gather

__all__ = ["rope_gather"]
