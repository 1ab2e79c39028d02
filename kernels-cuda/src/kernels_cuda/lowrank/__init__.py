"""Optimizer steps in little memory: moments as 8-bit codes, and updates in a low-rank space."""

from kernels_cuda.lowrank.adam8bit_step_ import adam8bit_step_
from kernels_cuda.lowrank.adam_step_ import adam_step_
from kernels_cuda.lowrank.channel_update_ import channel_update_
from kernels_cuda.lowrank.dequantize_blockwise import dequantize_blockwise
from kernels_cuda.lowrank.gaussian_ import gaussian_
from kernels_cuda.lowrank.lowrank_update_ import lowrank_update_
from kernels_cuda.lowrank.pack_int4 import pack_int4
from kernels_cuda.lowrank.project import project_accumulate_, project_int4
from kernels_cuda.lowrank.quantize_blockwise import quantize_blockwise
from kernels_cuda.lowrank.unpack_int4 import unpack_int4

__all__ = [
    "adam8bit_step_",
    "adam_step_",
    "channel_update_",
    "dequantize_blockwise",
    "gaussian_",
    "lowrank_update_",
    "pack_int4",
    "project_accumulate_",
    "project_int4",
    "quantize_blockwise",
    "unpack_int4",
]
