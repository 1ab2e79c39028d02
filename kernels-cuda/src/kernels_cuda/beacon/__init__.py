"""Memory of beacon models: keys that move to other positions, and attention over what is held."""

from kernels_cuda.beacon.decode_attention import decode_attention
from kernels_cuda.beacon.rope_evict_ import rope_evict_
from kernels_cuda.beacon.rope_gather import rope_gather
from kernels_cuda.beacon.rope_gather_append_ import rope_gather_append_
from kernels_cuda.beacon.segment_merge import segment_merge

__all__ = ["decode_attention", "rope_evict_", "rope_gather", "rope_gather_append_", "segment_merge"]
