"""`lowrank-opt bench --suite cuda`: what a GPU must reach, each figure beside the rate that the same GPU has for plain products and copies.

Every function takes device and sizes, so that the CPU can run the same code on small ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import nn

from lm_core.figures import Figure
from lowrank_opt import AdamW8bit, GaLoreAdamW8bit, build_param_groups
from lowrank_opt.commands import BenchConfig
from lowrank_opt.memory import model_of
from lowrank_opt.projector import basis, gaussian


def seconds(function: Callable[[], Any], device: str, repeats: int, warm: int = 3) -> float:
    """Median time of a call by the clock, waiting for the device before and behind it."""
    times = []
    for _ in range(warm + repeats):
        wait(device)
        began = time.perf_counter()
        function()
        wait(device)
        times.append(time.perf_counter() - began)
    return median(times[warm:])


def wait(device: str) -> None:
    """Return when everything that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def numbers(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)


def whole_model(config: BenchConfig, device: str = "cuda", model: str = "llama_7b", rank: int = 1024, side: int = 8192) -> Iterator[Figure]:
    """An update of all parameters in bfloat16. The floor is the time of its two products per matrix at the rate of a large one."""
    square = numbers(side, side, device=device, dtype=torch.bfloat16)
    rate = 2 * side**3 / seconds(lambda: square @ square, device, config.repeats)
    network = model_of(model).to(torch.bfloat16).to_empty(device=device)
    # matrices of equal shape share a gradient, so that weights and states alone fill the device
    shapes = {weight.shape for weight in network.parameters()}
    gradients = {shape: numbers(*shape, device=device, dtype=torch.bfloat16) for shape in shapes}
    for weight in network.parameters():
        with torch.no_grad():
            weight.normal_(0, 0.02)
        weight.grad = gradients[weight.shape]
    optimizer = GaLoreAdamW8bit(build_param_groups(network, rank=rank, update_proj_gap=10**9, stagger=False), lr=1e-4)
    low_rank = sum(weight.numel() for group in optimizer.param_groups if group["rank"] for weight in group["params"])
    operations = 4 * rank * low_rank
    took = seconds(optimizer.step, device, config.repeats)
    what = f"GaLoreAdamW8bit update of {model} r {rank} over its products at {rate / 1e12:.3g} TFLOP/s"
    yield Figure("G1", what, took * rate / operations, 1.3, details={"seconds": took, "operations": operations})


def bandwidth(config: BenchConfig, device: str = "cuda", side: int = 8192) -> Iterator[Figure]:
    """Bytes that a step must move (weight in and out, gradient, two moments of 8 bits in and out, their maxima) per second, over those of a copy."""
    weight = nn.Parameter(numbers(side, side, device=device))
    weight.grad = numbers(side, side, device=device)
    other = torch.empty_like(weight.grad)
    copied = 2 * other.nbytes / seconds(lambda: other.copy_(weight.detach()), device, config.repeats)
    optimizer = AdamW8bit([weight])
    optimizer.step()
    moved = 3 * weight.nbytes + 2 * optimizer.state_bytes()
    took = seconds(optimizer.step, device, config.repeats)
    what = f"bytes per second of an AdamW8bit step {side}x{side}, float32, over those of a copy at {copied / 1e9:.4g} GB/s"
    yield Figure("G2", what, moved / took / copied, 0.75, least=True, details={"seconds": took, "bytes": moved})


def refresh(config: BenchConfig, device: str = "cuda", shape: tuple[int, int] = (4096, 11008), rank: int = 1024) -> Iterator[Figure]:
    gradient = numbers(*shape, device=device)
    took = seconds(lambda: basis(gradient, "left", rank, "auto", draw=gaussian(0, 0, 0)), device, config.repeats)
    yield Figure("G3", f"milliseconds of a refresh by auto, {shape[0]}x{shape[1]} r {rank}", 1e3 * took, 25.0)


MEASUREMENTS: dict[str, Callable[[BenchConfig], Iterator[Figure]]] = {"G1": whole_model, "G2": bandwidth, "G3": refresh}
