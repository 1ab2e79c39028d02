"""What a run will cost, before it starts: parameters, FLOPs, memory by part, steps and hours."""

from __future__ import annotations

import logging
import math
import re
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from lm_core.memory import Live, current_bytes, peak_bytes, reset_peak
from lm_core.models import hf_model
from lm_core.progress import Size

if TYPE_CHECKING:
    from lm_core.data.loader import Loader
    from lm_core.engine.base import Engine
    from lm_core.method import Batch, Method
    from lm_core.progress import Budget

__all__ = ["Estimate", "Memory", "Parameters", "estimate", "flops_per_token", "parameters", "peak_bytes", "peak_flops", "reset_peak"]

log = logging.getLogger(__name__)

PEEK = 8  # steps whose batches are looked at


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements, tied tensors counted once; `active` are those that one token passes through."""

    total: int
    trained: int
    active: int


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of this process. The parts need not be held at the same moment; `peak` is the most that is.

    `runtime` is the rest: interpreter, libraries, data, and what the memory allocator cannot use again.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    runtime: int
    peak: int

    def __str__(self) -> str:
        return "memory GiB  " + "  ".join(f"{name} {size / 2**30:.2f}" for name, size in asdict(self).items())


@dataclass(frozen=True)
class Estimate:
    """Prediction of a run. `seconds` are those of forward and backward passes, measured on one micro-batch."""

    parameters: Parameters
    memory: Memory
    samples: int
    tokens: int
    seconds: float
    steps: int
    flops_per_token: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: `parameters`, `memory` (bytes), `step` and `run`."""
        return {
            "parameters": asdict(self.parameters),
            "memory": asdict(self.memory),
            "flops_per_token": self.flops_per_token,
            "step": {"samples": self.samples, "tokens": self.tokens, "seconds": self.seconds},
            "run": {"steps": self.steps, "tokens": self.steps * self.tokens, "hours": self.steps * self.seconds / 3600},
        }

    def __str__(self) -> str:
        counts = "  ".join(f"{name} {count:,}" for name, count in asdict(self.parameters).items())
        hours = self.steps * self.seconds / 3600
        return (
            f"parameters  {counts}\n{self.memory}\n"
            f"step        samples {self.samples:,}  tokens {self.tokens:,}  seconds {self.seconds:.2f}\n"
            f"run         steps {self.steps:,}  tokens {self.steps * self.tokens:,}  hours {hours:.2f}"
        )


def estimate(engine: Engine, method: Method, data: Loader, budget: Budget, flops: float) -> Estimate:
    """Predict the run that `engine` and `data` are about to start from its first steps; every rank must call it.

    Runs one micro-batch twice, the largest of those steps. Neither weights, nor optimizer state, nor the position in the data change.
    """
    from lm_core.train import measure

    position = data.state_dict()
    steps = [next(data) for _ in range(PEEK)]
    data.load_state_dict(position)
    sizes = [measure(engine, method, batches) for batches in steps]
    size = Size(*(round(sum(getattr(each, unit) for each in sizes) / PEEK) for unit in ("samples", "tokens", "targets")))
    # rows may differ in length, and the longest ones decide
    largest = max((batch for batches in steps for batch in batches), key=lambda batch: sum(tensor.numel() for tensor in batch.values()))
    memory, seconds = _memory(engine, method, largest, accumulate=len(steps[0]))
    seconds *= sum(method.tokens(batch) for batches in steps for batch in batches) / PEEK / max(1, method.tokens(largest))
    return Estimate(
        parameters=engine.counts or parameters(engine.model),
        memory=memory,
        samples=size.samples,
        tokens=size.tokens,
        seconds=seconds,
        steps=steps_of(budget, size, seconds, data.epoch_samples),
        flops_per_token=flops,
    )


def steps_of(budget: Budget, size: Size, seconds: float, epoch_samples: int) -> int:
    """Steps until the first limit of `budget`, if all are like the first one."""
    per_step = {
        "steps": 1.0,
        "samples": size.samples,
        "tokens": size.tokens,
        "targets": size.targets,
        "epochs": size.samples / epoch_samples,
        "hours": seconds / 3600,
    }
    return math.ceil(min(limit / max(per_step[unit], 1e-12) for unit, limit in budget.limits.items()))


def parameters(model: nn.Module) -> Parameters:
    """Counts of `model`, whole ones under sharded engines too. Routed experts are active by the share of them a token visits."""
    total = trained = 0
    active = 0.0
    share = _expert_share(model)
    for name, parameter in model.named_parameters():
        count = _elements(parameter)
        total += count
        trained += count if parameter.requires_grad else 0
        active += count * share if ".experts." in name else count
    return Parameters(total=total, trained=trained, active=round(active))


def _expert_share(model: nn.Module) -> float:
    """Experts per token over experts, by the names that transformers' configs use; 1 for dense models."""
    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    values = inner.config.to_dict() if inner is not None else {}
    chosen = next(
        (values[key] for key in ("num_experts_per_tok", "num_experts_per_token", "num_selects", "top_k_experts") if values.get(key)), 0
    )
    experts = next((values[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if values.get(key)), 0)
    return float(chosen) / float(experts) if chosen and experts else 1.0


def _elements(parameter: Any, *, here: bool = False) -> int:
    """Elements of the whole tensor, or of this process's part (`here`); knows DTensor (FSDP2) and ZeRO-3."""
    return _here(parameter).numel() if here else int(getattr(parameter, "ds_numel", parameter.numel()))


def _here(tensor: Any) -> Tensor:
    """This process's part of a tensor."""
    part = getattr(tensor, "ds_tensor", tensor)
    return cast(Tensor, part.to_local() if hasattr(part, "to_local") else part)


# --- memory ---


def _memory(engine: Engine, method: Method, batch: Batch, accumulate: int) -> tuple[Memory, float]:
    """Memory by part from one real micro-batch of `accumulate` per step, and the seconds it takes once more.

    The peak is in one of two places: in a backward pass, when activations are alive beside (part of) the gradients,
    or in the update, when all gradients are. From the second micro-batch of a step on, all gradients are alive in both.
    """
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    state = [_here(value) for entry in engine.optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    tensors = [_here(tensor).detach() for tensor in [*engine.model.parameters(), *engine.model.buffers()]]
    for tensor in tensors:
        # weights mapped from a file are resident only once they were read
        tensor.sum()
    before = current_bytes(engine.device)
    live = Live([*tensors, *state])
    reset_peak(engine.device)
    gradients, loose = _one_micro_batch(engine, method, batch, live, trained)
    # an allocator keeps what was freed in pieces it cannot join, and operators allocate inside themselves;
    # below zero where tensors were made and never written, like DeepSpeed's buckets
    seen = live.peak()
    overhead = peak_bytes(engine.device) - before - seen
    activations = live.peak(without=gradients)
    largest = max((gradient.nbytes for gradient in gradients), default=0)
    whole = sum(gradient.nbytes for gradient in gradients) or sum(4 * _elements(parameter, here=True) for parameter in trained)
    if loose:
        # layer-wise updates: a gradient is used and freed before the next one exists
        whole, backward = largest, activations + largest
    elif accumulate == 1:
        backward = seen
    else:
        # a new gradient exists beside the sum it is added to
        backward = whole + activations + largest
    del gradients
    engine.drop()
    # the first pass may have compiled operators, and was watched operation by operation
    finished = torch.cuda.synchronize if engine.device.type == "cuda" else lambda device: None
    finished(engine.device)
    began = time.perf_counter()
    _one_micro_batch(engine, method, batch, nullcontext(), trained)
    finished(engine.device)
    seconds = time.perf_counter() - began
    engine.drop()
    held = sum(tensor.nbytes for tensor in state)
    optimizer = max(held, _optimizer_bytes(engine, trained))
    weights = sum({part.data_ptr(): stored_bytes(part) for part in tensors}.values())
    update = whole + int(getattr(engine.optimizer, "predicted_step_bytes", lambda: 0)())
    peak = before + (optimizer - held) + max(backward + overhead, update)
    runtime = max(0, before - weights - held) + max(0, overhead)
    return Memory(weights, whole, optimizer, activations, runtime, peak), seconds


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes: fewer than its entries have where it stands for something kept elsewhere."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _one_micro_batch(
    engine: Engine, method: Method, batch: Batch, live: AbstractContextManager[Any], trained: list[nn.Parameter]
) -> tuple[list[Tensor], bool]:
    """Gradients of one micro-batch as the engine makes them, and whether the engine would have used them up at once."""
    if not getattr(engine.optimizer, "per_layer", False):
        with live:
            engine.accumulate(method, [batch], max(1, method.targets(batch)))
        return [_here(parameter.grad) for parameter in trained if parameter.grad is not None], False
    found: list[Tensor] = []
    with live:
        losses = iter(method.losses(engine.model, batch.to(engine.device)))
        while True:
            with engine.autocast():
                loss = next(losses, None)
            if loss is None:
                return found, True
            # unlike backward(), this does not wake the hooks that update weights
            found += [gradient for gradient in torch.autograd.grad(loss.total, trained, allow_unused=True) if gradient is not None]


def _optimizer_bytes(engine: Engine, trained: list[nn.Parameter]) -> int:
    """What the optimizer says it will keep (`predicted_state_bytes`), else AdamW's two float32 moments."""
    predicted = getattr(engine.optimizer, "predicted_state_bytes", None)
    if predicted is not None:
        return int(predicted())
    elements = sum(_elements(parameter, here=True) for parameter in trained)
    if getattr(engine, "kind", "") == "deepspeed" and not any(hasattr(parameter, "ds_numel") for parameter in trained):
        # ZeRO 1 and 2 keep whole weights and share the state out
        elements //= engine.data_world
    return 8 * elements


# --- FLOPs ---


def flops_per_token(model: nn.Module, length: int) -> float:
    """FLOPs of forward and backward per token in sequences of `length` tokens, counted on the meta device.

    The count of the plain algorithm, as model FLOPs utilisation wants it: nothing recomputed, attention over whole
    rows (no causal discount, as in PaLM's 6 N + 12 L T D), gradients only of what is trained. Where the model cannot
    run without data (routing that looks at values) that closed form is used.
    """
    inner = hf_model(model)
    modes = {module: module.training for module in inner.modules()}
    inner.train(False)  # no activation is recomputed in this mode
    try:
        return _counted(inner, length)
    except (RuntimeError, NotImplementedError) as error:
        log.debug("FLOPs by formula, since the model does not run on the meta device: %s", error)
        return _by_formula(inner, length)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _counted(model: PreTrainedModel, length: int) -> float:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = {name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad) for name, tensor in tensors}
    # with a cache transformers does not look for packed documents in the positions, which have no values here
    inputs = {"input_ids": torch.zeros(1, length, dtype=torch.long, device="meta"), "use_cache": True}
    with FlopCounterMode(display=False) as counter:
        functional_call(model, empty, (), inputs).logits.sum().backward()
    return float(counter.get_total_flops() / length)


def _by_formula(model: PreTrainedModel, length: int) -> float:
    config = model.config.get_text_config()
    share = _expert_share(model)
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embedding  # type: ignore[no-untyped-call]
    total: float = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and (parameter is not embedding or tied):
            total += parameter.numel() * (share if ".experts." in name else 1) * (6 if parameter.requires_grad else 4)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return float(total + 12 * config.num_hidden_layers * length * width)


# Dense peak in FLOP/s by device name as torch reports it: (bf16 or fp16 tensor cores, float32). Vendors' data sheets, no sparsity.
_DEVICES = {
    r"GB?300|GB?200|B200": (2250e12, 75e12),
    r"H200|H100.*(HBM3|SXM)|GH200": (989e12, 67e12),
    r"H100.*NVL": (835e12, 60e12),
    r"H100|H800": (756e12, 51e12),
    r"A100|A800": (312e12, 19.5e12),
    r"L40S": (362e12, 91.6e12),
    r"L40|RTX 6000 Ada": (181e12, 90.5e12),
    r"A40|A6000": (150e12, 37.4e12),
    r"A10G?\b": (125e12, 31.2e12),
    r"\bL4\b": (121e12, 30.3e12),
    r"V100": (125e12, 15.7e12),
    r"\bT4\b": (65e12, 8.1e12),
    r"5090": (210e12, 105e12),
    r"4090": (165e12, 82.6e12),
    r"3090": (71e12, 35.6e12),
    r"MI300X": (1307e12, 163e12),
    r"MI250X": (383e12, 47.9e12),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense FLOP/s that `device` can reach at `precision` (fp32, bf16, fp16); None for an unknown GPU.

    GPUs by a table of names; the CPU by multiplying two matrices once with the threads torch uses.
    """
    if device.type == "cpu":
        return _cpu_flops(precision, torch.get_num_threads())
    if device.type != "cuda":
        return None
    return _named_flops(torch.cuda.get_device_name(device), precision)


def _named_flops(name: str, precision: str) -> float | None:
    for pattern, (half, single) in _DEVICES.items():
        if re.search(pattern, name):
            return single if precision == "fp32" else half
    return None


@lru_cache
def _cpu_flops(precision: str, threads: int, size: int = 768) -> float:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)
