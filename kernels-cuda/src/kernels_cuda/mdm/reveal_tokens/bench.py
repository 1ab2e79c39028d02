"""Shapes to time, and what they are compared with."""

from __future__ import annotations

from functools import partial

import torch

from kernels_cuda.bench import Shape
from kernels_cuda.mdm.reveal_tokens import reference, reveal_tokens
from kernels_cuda.mdm.reveal_tokens.cases import make

ROWS, VOCABULARY = 128, 49280
SHAPES = [
    Shape(
        name=f"{ROWS} x {VOCABULARY}, {what}",
        dtype=torch.float32,
        make=partial(make, torch.float32, ROWS, VOCABULARY, **settings),
        function=reveal_tokens,
        baseline=reference.reveal_tokens,
        baseline_name="plain PyTorch",
        flops=0,
        bytes=ROWS * VOCABULARY * 4,
    )
    for what, settings in {"likeliest": {"temperature": 0.0}, "drawn": {}, "top 50 of 0.9": {"top_k": 50, "top_p": 0.9}}.items()
]
