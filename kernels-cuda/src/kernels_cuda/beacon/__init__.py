"""Memory of beacon models: keys that move to other positions."""

from kernels_cuda.beacon.rope_evict_ import rope_evict_
from kernels_cuda.beacon.rope_gather import rope_gather
from kernels_cuda.beacon.rope_gather_append_ import rope_gather_append_

__all__ = ["rope_evict_", "rope_gather", "rope_gather_append_"]
