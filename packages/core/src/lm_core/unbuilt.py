"""What a run would cost that this machine cannot hold: the estimate of `estimate.py` on the meta device, where nothing is allocated."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_core import dist
from lm_core.estimate import Estimate, Memory, Parameters, parameters, peak_flops, steps_of, stored_bytes
from lm_core.memory import Live, current_bytes
from lm_core.optim import param_groups
from lm_core.progress import Size

if TYPE_CHECKING:
    from lm_core.data.loader import Loader
    from lm_core.method import Batch, Method
    from lm_core.options import RunConfig

logger = logging.getLogger(__name__)


def estimate_unbuilt(config: RunConfig, method: Method, data: Loader, device: torch.device) -> Estimate | None:
    """The cost of one process's share of the run, or None where the machine can hold it or the method does not run without values.

    Weights, gradients and optimizer state are exact; activations are those of the weights' dtype, or half of them
    under 16-bit autocast; seconds are FLOPs over the device's peak.
    """
    batches = next(data)
    found = without_values(config, method, batches[0], device)
    if found is None or found[0].peak < available_bytes(device):
        return None
    memory, counts, flops = found
    peak, free = memory.peak / 2**30, available_bytes(device) / 2**30
    logger.warning(
        "a peak of %.1f GiB is more than the %.1f GiB that are free: nothing was built, and seconds assume peak FLOP/s", peak, free
    )
    size = Size(
        samples=data.global_batch,
        tokens=sum(map(method.tokens, batches)) * dist.world(),
        targets=sum(map(method.targets, batches)) * dist.world(),
    )
    seconds = flops * size.tokens / dist.world() / (peak_flops(device, config.precision) or float("inf"))
    steps = steps_of(config.limits(), size, seconds, data.epoch_samples)
    return Estimate(counts, memory, size.samples, size.tokens, seconds, steps, flops)


def without_values(config: RunConfig, method: Method, batch: Batch, device: torch.device) -> tuple[Memory, Parameters, float] | None:
    """Memory of a process on `device` whose micro-batches are like `batch`, parameters, and FLOPs per token; None where the method
    does not run without values."""
    try:
        return _traced(config, method, batch, device)
    except (RuntimeError, NotImplementedError) as error:
        logger.debug("no estimate without values: %s", error)
        return None


def _traced(config: RunConfig, method: Method, batch: Batch, device: torch.device) -> tuple[Memory, Parameters, float]:
    with torch.device("meta"):
        model = method.build()
        groups = param_groups(model, method.param_rules(), config)
        live = Live([*model.parameters(), *model.buffers()])
        with live:
            for loss in method.losses(model, batch.to(torch.device("meta"))):
                loss.total.backward()
    trained = [parameter for group in groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    activations = live.peak(without=gradients)
    if config.precision != "fp32" and all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        activations //= 2
    weights = sum(stored_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])
    held = sum(parameter.nbytes for parameter in trained)
    try:
        made: Any = method.optimizer(groups)
        optimizer = int(made.predicted_state_bytes())
    except (AttributeError, RuntimeError):
        # torch's own optimizers do not say, and fused ones refuse tensors without values
        optimizer = 8 * sum(parameter.numel() for parameter in trained)
    else:
        if getattr(made, "per_layer", False):
            # a gradient is used and freed before the next one exists
            held = max(parameter.nbytes for parameter in trained)
    runtime = current_bytes(device)
    memory = Memory(weights, held, optimizer, activations, runtime, runtime + weights + optimizer + held + activations)
    return memory, parameters(model), method.flops_per_token(model)


def available_bytes(device: torch.device) -> int:
    """Memory that is free for this process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return 2**63
