"""Times ops: `python -m kernels_cuda.bench [op ...]` prints time, the floor of the machine, and a baseline, from paired runs.

Nothing is timed before the op's tests have passed. Times on a CPU are of the process, over all its threads, so another
process on the machine disturbs them little; the floor comes from ceilings measured in the same minute.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kernels_cuda import build, testing


@dataclass(frozen=True)
class Shape:
    """One input to time, forward and (if a tensor requires grad) backward, against a baseline."""

    name: str
    dtype: torch.dtype
    make: Callable[[], testing.Arguments]
    function: Callable[..., Any]
    baseline: Callable[..., Any]
    baseline_name: str
    flops: int  # of the matrix products that cannot be avoided
    bytes: int  # that must be read or written at least once
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # others to compare with, by name
    devices: Sequence[str] = ("cpu", "cuda")  # where it is timed


@dataclass(frozen=True)
class Measured:
    """One run, or the median of several."""

    cpu_seconds: float  # of all threads; the device's time where it is a GPU
    peak_bytes: int  # at the highest point, beyond what was there before
    spread: float = 0.0  # (largest - smallest) time / median


def measure(function: Callable[[], Any], *, fresh: bool = True) -> Measured:
    """Time and peak memory of one call on the CPU.

    fresh: pages that earlier calls left in the allocator go back first (glibc only), so that they count again, in memory and in
    the time it takes to get them.
    """
    if fresh and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    # peak counting starts anew; Linux only, elsewhere the peak is that of the whole process
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    before, started = _memory("VmRSS"), time.process_time()
    function()
    return Measured(time.process_time() - started, _memory("VmHWM") - before)


def _memory(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure_gpu(function: Callable[[], Any]) -> Measured:
    """Time and peak memory of one call on the current GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return Measured(start.elapsed_time(end) / 1000, torch.cuda.max_memory_allocated() - before)


def paired(shape: Shape, repeats: int, device: str = "cpu") -> tuple[Measured, Measured]:
    """The op and its baseline, as `in_turns` measures them."""
    ours, theirs = in_turns(shape, [shape.function, shape.baseline], repeats, device)
    return ours, theirs


def in_turns(shape: Shape, functions: Sequence[Callable[..., Any]], repeats: int, device: str = "cpu") -> list[Measured]:
    """Medians of all functions, run in turns on the same input, after one run of each that does not count and one from which the peak
    of memory is taken."""
    arguments = testing.moved(shape.make(), device=device)
    leaves = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]

    def run(function: Callable[..., Any], fresh: bool) -> Measured:
        def call() -> Any:
            return torch.autograd.grad(function(**arguments).sum() / 1024, leaves) if leaves else function(**arguments)

        return measure(call, fresh=fresh) if device == "cpu" else measure_gpu(call)

    for function in functions:
        run(function, False)
    peaks = [run(function, True).peak_bytes for function in functions]
    runs = [[run(function, False) for function in functions] for _ in range(repeats)]
    return [_middle(each, peak) for each, peak in zip(zip(*runs, strict=True), peaks, strict=True)]


def _middle(runs: Sequence[Measured], peak_bytes: int) -> Measured:
    seconds = [run.cpu_seconds for run in runs]
    middle = median(seconds)
    return Measured(middle, peak_bytes, (max(seconds) - min(seconds)) / middle)


def ceilings(dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """FLOP/s of a matrix product and bytes/s of a copy, the best of five, per second of `Measured.cpu_seconds`."""
    take = measure if device == "cpu" else measure_gpu
    size, copied = (2048, 2**26) if device == "cpu" else (8192, 2**30)
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = min(take(lambda: left @ right).cpu_seconds for _ in range(5))
    copy = min(take(lambda: target.copy_(source)).cpu_seconds for _ in range(5))
    return 2 * size**3 / product, 2 * copied / copy


def shapes(op: str) -> list[Shape]:
    """What the op's bench.py lists."""
    found: list[Shape] = importlib.import_module(f"kernels_cuda.{op.replace('/', '.')}.bench").SHAPES
    return found


def report(op: str, shape: Shape, repeats: int, device: str = "cpu") -> str:
    """A line for the op, and one for each function it is compared with."""
    flops, speed = ceilings(shape.dtype, device)
    others = {shape.baseline_name: shape.baseline, **shape.peers}
    ours, *theirs = in_turns(shape, [shape.function, *others.values()], repeats, device)
    floor = max(shape.flops / flops, shape.bytes / speed)
    dtype = str(shape.dtype).removeprefix("torch.")
    mib = 2**20
    own = (
        f"{op}  {shape.name} {dtype}  {ours.cpu_seconds * 1000:.4g} ms +- {ours.spread / 2:.0%}"
        f"  floor {floor * 1000:.4g} ms ({flops / 1e9:.4g} GFLOP/s, {speed / 1e9:.3g} GB/s)  {ours.cpu_seconds / floor:.2f}x floor"
        f"  peak {ours.peak_bytes / mib:.0f} MiB  [{_place(device)}]"
    )
    lines = [
        f"    {ours.cpu_seconds / other.cpu_seconds:.2f}x of {other.cpu_seconds * 1000:.4g} ms +- {other.spread / 2:.0%}"
        f"  peak {other.peak_bytes / mib:.0f} MiB  {name}"
        for name, other in zip(others, theirs, strict=True)
    ]
    return "\n".join([own, *lines])


def _place(device: str) -> str:
    """Processor, threads and commit, without which a number means nothing."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
        name = f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    describe = ["git", "-C", str(build.PACKAGE), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "no commit"
    return f"{name}, torch {torch.__version__}, {commit}"


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m kernels_cuda.bench", description="Time ops against their floor and a baseline.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"Ops to time, of: {', '.join(build.ops())}. Default: all.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Where to run. Default: cpu.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads. Default: torch's.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed runs of op and baseline each. Default: 5.")
    chosen = parser.parse_args(words)
    if unknown := set(chosen.ops) - set(build.ops()):
        parser.error(f"op: {', '.join(sorted(unknown))} is not an op; use one of {', '.join(build.ops())}")
    torch.set_num_threads(chosen.threads)
    for op in chosen.ops or build.ops():
        try:
            testing.verify(testing.find(op), chosen.device)
            if chosen.device == "cuda":
                testing.verify(testing.find(op), "cuda-chunked")
        except AssertionError as error:
            print(f"{op}: not timed, because its tests fail: {error}", file=sys.stderr)
            return 1
        with testing.using(chosen.device):
            for shape in (shape for shape in shapes(op) if chosen.device in shape.devices):
                print(report(op, shape, chosen.repeats, chosen.device), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
