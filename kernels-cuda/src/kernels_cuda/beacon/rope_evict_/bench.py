"""Shapes to time, and what they are compared with."""

from __future__ import annotations

import torch

from kernels_cuda.beacon.from_length import from_same_length
from kernels_cuda.beacon.rope_evict_ import reference, rope_evict_
from kernels_cuda.beacon.rope_evict_.cases import make
from kernels_cuda.bench import Shape


def shape(entries: int, dtype: torch.dtype) -> Shape:
    """A full memory that loses its oldest window behind a sink, 8 heads of 64."""
    return Shape(
        name=f"C={entries}",
        dtype=dtype,
        make=lambda: make(dtype, 8, entries, 64, [(entries, 1, 128)]),
        function=from_same_length(rope_evict_),
        baseline=from_same_length(reference.rope_evict_),
        baseline_name="the reference",
        flops=0,
        # keys and values of what moves are read and written
        bytes=2 * 2 * 8 * (entries - 129) * 64 * dtype.itemsize,
    )


SHAPES = [shape(4096, torch.float32), shape(4096, torch.bfloat16)]
