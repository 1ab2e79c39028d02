"""Shapes to time, and what they are compared with."""

from __future__ import annotations

import torch

from kernels_cuda.beacon.from_length import from_same_length
from kernels_cuda.beacon.rope_gather_append_ import reference, rope_gather_append_
from kernels_cuda.beacon.rope_gather_append_.cases import make
from kernels_cuda.bench import Shape


def shape(entries: int, dtype: torch.dtype) -> Shape:
    """The beacons of a text, 8 heads of 64."""
    return Shape(
        name=f"N={entries}",
        dtype=dtype,
        make=lambda: make(dtype, 1, 8, entries, entries, 64),
        function=from_same_length(rope_gather_append_),
        baseline=from_same_length(reference.rope_gather_append_),
        baseline_name="the reference",
        flops=0,
        # keys and values are read and written
        bytes=2 * 2 * 8 * entries * 64 * dtype.itemsize,
    )


SHAPES = [shape(1024, torch.float32), shape(1024, torch.bfloat16)]
