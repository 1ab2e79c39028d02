"""Which implementation of an op runs: the user's wish, what the machine has, and where the tensors are."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Literal, get_args

import torch

from kernels_cuda.build import BuildError, Kind, load

# auto: kernels where they can be had, else the reference with one warning. cpu and cuda: those kernels or an error.
# cuda-chunked: as cuda, but ops that have a path by chunks of tokens on tensor cores take it where dtype and GPU allow.
# emulated, emulated-chunked: the CUDA sources run on the CPU, slowly; for tests.
Choice = Literal["auto", "reference", "cpu", "cuda", "cuda-chunked", "emulated", "emulated-chunked"]
CHOICES: tuple[str, ...] = get_args(Choice)

_used: Choice | None = None


def use(choice: str) -> str:
    """Choose the kernels of this process, and return the choice that held before.

    `choice`: auto, reference, cpu, cuda or cuda-chunked; the variable KERNELS_CUDA gives the choice until this is called. A choice that cannot
    be had raises here (ValueError, BuildError) or, when it depends on an op, in the op's first call. Functions that
    torch.compile has already compiled keep the choice they were compiled with.
    """
    global _used
    before = chosen()
    _used = _checked(choice, "use(choice)")
    if choice.startswith("cuda") and not torch.cuda.is_available():
        _used = _checked(before, "use(choice)")
        raise BuildError(f"use(choice): {choice!r} cannot be had because torch sees no GPU; use 'auto' or 'cpu'")
    return before


def chosen() -> Choice:
    """The choice in force."""
    return _used or _checked(os.environ.get("KERNELS_CUDA") or "auto", "KERNELS_CUDA")


def _checked(choice: str, field: str) -> Choice:
    if choice not in CHOICES:
        raise ValueError(f"{field}: {choice!r} is not a choice of kernels; use one of {', '.join(CHOICES)}")
    return choice  # type: ignore[return-value]


def library(op: str, device: str) -> str:
    """Name of the torch.ops library with the kernels of `op` for tensors on `device` ("cpu", "cuda", ...); "" for the reference.

    Compiles on first use, which takes seconds; later calls cost microseconds.
    """
    return _library(chosen(), op, device)


# what torch.compiler.assume_constant_result does, less the two seconds in which it imports torch._dynamo
library._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _library(choice: Choice, op: str, device: str) -> str:
    family = op.split("/")[0]
    # tensors without data are only measured, and counters know plain operations best
    if choice == "reference" or device == "meta":
        return ""
    kind: Kind
    if choice == "auto":
        if device not in ("cpu", "cuda"):
            return ""
        kind = "cpu" if device == "cpu" else "cuda"
        try:
            load(op, kind)
        except BuildError as error:
            _warn_once(str(error))
            return ""
        return family
    kind = choice.removesuffix("-chunked")  # type: ignore[assignment]
    home = "cuda" if kind == "cuda" else "cpu"
    if device != home:
        raise BuildError(f"KERNELS_CUDA: {choice!r} has no kernels for tensors on {device!r}; use 'auto', or move the tensors to {home!r}")
    load(op, kind)
    return f"{family}_emulated" if kind == "emulated" else family


def chunked(device: torch.device, shared_bytes: int) -> bool:
    """Whether ops that have a path by chunks on tensor cores take it on `device`, where a block of it needs that much shared memory."""
    if chosen() == "cuda-chunked" and device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        # torch's stubs leave the number out, and it is absent for AMD's GPUs
        return gpu.major >= 8 and int(getattr(gpu, "shared_memory_per_block_optin", 0)) >= shared_bytes
    return chosen() == "emulated-chunked"


chunked._dynamo_marked_constant = True  # type: ignore[attr-defined]


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        warnings.warn(f"kernels_cuda uses its slower PyTorch references, which also need more memory, because {reason}", stacklevel=2)
    _warned = True
