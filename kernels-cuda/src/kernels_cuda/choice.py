"""Which implementation of an op runs: the user's wish, what the machine has, and where the tensors are."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Literal, get_args

import torch

from kernels_cuda.build import BuildError, Kind, load

# auto: kernels where they can be had, else the reference with one warning. cpu and cuda: those kernels or an error.
# emulated: the CUDA sources run on the CPU, slowly; for tests.
Choice = Literal["auto", "reference", "cpu", "cuda", "emulated"]
CHOICES: tuple[str, ...] = get_args(Choice)

_used: Choice | None = None


def use(choice: str) -> str:
    """Choose the kernels of this process, and return the choice that held before.

    `choice`: auto, reference, cpu or cuda; the variable KERNELS_CUDA gives the choice until this is called. A choice that cannot
    be had raises here (ValueError, BuildError) or, when it depends on an op, in the op's first call. Functions that
    torch.compile has already compiled keep the choice they were compiled with.
    """
    global _used
    before = chosen()
    _used = _checked(choice, "use(choice)")
    if choice == "cuda" and not torch.cuda.is_available():
        _used = _checked(before, "use(choice)")
        raise BuildError("use(choice): 'cuda' cannot be had because torch sees no GPU; use 'auto' or 'cpu'")
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
    kind, home = {"cpu": ("cpu", "cpu"), "cuda": ("cuda", "cuda"), "emulated": ("emulated", "cpu")}[choice]  # type: ignore[assignment]
    if device != home:
        raise BuildError(f"KERNELS_CUDA: {choice!r} has no kernels for tensors on {device!r}; use 'auto', or move the tensors to {home!r}")
    load(op, kind)
    return f"{family}_emulated" if choice == "emulated" else family


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        warnings.warn(f"kernels_cuda uses its slower PyTorch references, which also need more memory, because {reason}", stacklevel=2)
    _warned = True
