"""Inputs that every operator is tested and timed with that masks tokens by draws at their address."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kernels_cuda.bench import Shape
from kernels_cuda.testing import Arguments, Call, Case, Refused

# p or k: what each sequence has of its own; (generator, eligible tokens of each) -> B values
Drawn = Callable[[torch.Generator, torch.Tensor], torch.Tensor]


def make(name: str, drawn: Drawn, rows: int, size: int, *, some: bool = True, key: int = 1234) -> Arguments:
    """Random sequences, a third of whose tokens are not eligible."""
    generator = torch.Generator().manual_seed(rows + size)
    eligible = torch.rand(rows, size, generator=generator) > 1 / 3 if some else torch.ones(rows, size, dtype=torch.bool)
    return {
        "ids": torch.randint(100, (rows, size), generator=generator),
        name: drawn(generator, eligible.sum(1)),
        "key": key,
        "stream": 3,
        "slot": torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        "mask_id": 100,
        "eligible": eligible if some else None,
    }


def cases(make: Callable[..., Arguments], name: str) -> list[Case]:
    """`make(dtype, rows, size)` of an operator; `name` is what each sequence has of its own."""

    def strided(dtype: torch.dtype) -> Arguments:
        arguments = make(dtype, 6, 50)
        half = {name: arguments[name][::2, 1:] for name in ("ids", "eligible")}
        # half of a count is one that half of the tokens allow
        own = arguments[name] if arguments[name].is_floating_point() else arguments[name] // 2
        return {**arguments, **half, name: own[::2], "slot": arguments["slot"][::2]}

    dtypes = (torch.float32,)
    return [
        Case("ordinary", partial(make, rows=5, size=300), dtypes),
        *(Case(f"{size} tokens", partial(make, rows=3, size=size), dtypes) for size in (1, 3, 4, 5, 64, 65)),
        Case("all eligible", partial(make, rows=2, size=70, some=False), dtypes),
        Case("negative key", partial(make, rows=2, size=70, key=-(2**63)), dtypes),
        Case("strided", strided, dtypes),
        Case("no sequence", partial(make, rows=0, size=5), dtypes),
        Case("no token", partial(make, rows=2, size=0), dtypes),
    ]


def refused(changed: Callable[..., Arguments], name: str) -> list[Refused]:
    """`changed(**arguments)` makes four sequences of three tokens, some arguments replaced."""
    return [
        Refused(
            "slots of others", lambda: changed(slot=torch.zeros(5, dtype=torch.int64)), rf"slot: shape \(5,\) has B = 5 where {name} has 4"
        ),
        Refused("longer eligible", lambda: changed(eligible=torch.ones(4, 5, dtype=torch.bool)), "size: 3 is not the number of tokens"),
    ]


def kernel_calls(make: Callable[..., Arguments], name: str, kernel: str, sizes: tuple[tuple[int, int, bool], ...]) -> list[Call]:
    """Calls of a compiled function."""
    found = []
    for rows, size, some in sizes:
        given = make(torch.float32, rows, size, some=some)
        masked = torch.zeros(rows, size, dtype=torch.bool)
        found.append(Call(kernel, (given[name], given["slot"], given["eligible"], masked, given["key"], given["stream"])))
    return found


def shapes(make: Callable[..., Arguments], function: Callable[..., Any], reference: Callable[..., Any]) -> list[Shape]:
    """What is timed."""
    rows, size = 64, 2048
    return [
        Shape(
            name=f"{rows} x {size}",
            dtype=torch.float32,
            make=partial(make, torch.float32, rows, size),
            function=function,
            baseline=reference,
            baseline_name="plain PyTorch",
            flops=0,
            # ids read and written, eligible read, masks written and read
            bytes=rows * size * (8 + 8 + 3),
        )
    ]
