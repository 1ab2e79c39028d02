"""What the benchmarks of recurrences share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from kernels_cuda import testing
from kernels_cuda.bench import Shape


def on_tensor_cores(shape: Shape, peers: Mapping[str, Callable[..., Any]]) -> Shape:
    """The same by chunks on a GPU, against the kernel that goes token by token; the reference would not fit into memory."""

    def chunked(**arguments: Any) -> Tensor:
        with testing.using("cuda-chunked"):
            found: Tensor = shape.function(**arguments)
            return found

    return replace(
        shape,
        function=chunked,
        baseline=shape.function,
        baseline_name="the kernel that goes token by token",
        peers=peers,
        devices=("cuda",),
    )
