"""Bytes that this process holds: now, at most, and at most during a stretch of work."""

from __future__ import annotations

import resource
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PROC = Path("/proc/self")


def current_bytes(device: torch.device) -> int:
    """Bytes held now: allocated by torch on a GPU, resident memory of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if (_PROC / "statm").exists():
        return int((_PROC / "statm").read_text().split()[1]) * resource.getpagesize()
    return peak_bytes(device)


def reset_peak(device: torch.device) -> None:
    """Start measuring the peak afresh; outside Linux the peak of a CPU run counts from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (_PROC / "clear_refs").exists():
        (_PROC / "clear_refs").write_text("5")  # proc(5): sets the resident high-water mark to the current size


def peak_bytes(device: torch.device) -> int:
    """The most bytes held at a time since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (_PROC / "status").exists():
        line = next(line for line in (_PROC / "status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Live(TorchDispatchMode):
    """Follows every tensor made while it is on, on any device: an exact count where resident memory is only a hint.

    What an operator allocates and frees inside itself is not seen. `known` are tensors that exist already.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers: dict[int, int] = {}
        self._events: list[tuple[int, int]] = []  # (number of the storage, bytes taken or given back)
        for tensor in known:
            self._number(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self._numbers:
                number, size = self._number(leaf), storage.nbytes()
                self._events.append((number, size))
                weakref.finalize(storage, self._freed, storage._cdata, number, size)
        return result

    def _number(self, tensor: Tensor) -> int:
        return self._numbers.setdefault(tensor.untyped_storage()._cdata, len(self._events))

    def _freed(self, key: int, number: int, size: int) -> None:
        # the address may be given to another storage from now on
        self._numbers.pop(key, None)
        self._events.append((number, -size))

    def peak(self, without: Iterable[Tensor] = ()) -> int:
        """The most bytes alive at a time, not counting the storages of `without`."""
        skipped = {self._numbers.get(tensor.untyped_storage()._cdata) for tensor in without}
        most = held = 0
        for number, size in self._events:
            held += 0 if number in skipped else size
            most = max(most, held)
        return most
