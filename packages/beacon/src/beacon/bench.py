"""Ratios that the method should keep, each beside its floor or baseline and its target: `beacon bench --only P1,P2`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from beacon.attach import attach_beacon
from beacon.config import BeaconConfig
from beacon.options import BenchConfig
from lm_core import dist

HIDDEN, LAYERS, VOCABULARY, RATIO = 256, 4, 512, 8


@dataclass(frozen=True)
class Machine:
    """Where is measured, how often, and on which shape."""

    device: torch.device
    repeats: int

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def length(self) -> int:
        return 8192 if self.gpu else 4096

    @property
    def window(self) -> int:
        return self.length // 8

    def model(self, **config: Any) -> Any:
        """A random llama of the measured shape, with beacons."""
        from transformers import LlamaConfig, LlamaForCausalLM

        stock = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=65536, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        settings = {"window": self.window, "stride": self.window, "ratio": [RATIO], **config}
        made: Any = LlamaForCausalLM(stock)
        return attach_beacon(made.to(self.device), BeaconConfig(**settings))

    def tokens(self, length: int | None = None, vocabulary: int = VOCABULARY) -> torch.Tensor:
        return torch.randint(0, vocabulary, (1, length or self.length), device=self.device)

    def clock(self) -> float:
        """Seconds of this process' processor time, or on a GPU of the clock once its work is done."""
        if not self.gpu:
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, *jobs: Callable[[], Any]) -> list[float]:
        """Median seconds of each job, taking turns; the first turn warms up."""
        taken: list[list[float]] = [[] for _ in jobs]
        for number in range(self.repeats + 1):
            for job, own in zip(jobs, taken):
                began = self.clock()
                job()
                if number:
                    own.append(self.clock() - began)
        return [statistics.median(own) for own in taken]


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure what was asked for; prints one line each, with its target and whether it is met."""
    torch.set_num_threads(config.threads)
    machine = Machine(dist.init(config.device), config.repeats)
    results: dict[str, Any] = {}
    asked: list[str] = [*config.only] or [*MEASURES]
    for name in asked:
        title, measure = MEASURES[name]
        torch.manual_seed(config.seed)
        found = measure(machine)
        results[name] = {"title": title, **found}
        values = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items())
        print(f"{name}  {title}: {values}")
    return results


def judged(found: dict[str, Any], target: str, met: bool) -> dict[str, Any]:
    return {**found, "target": target, "met": met}


def train_step(machine: Machine) -> dict[str, Any]:
    trained, ids = machine.model().train(), machine.tokens()

    def step(engine: str) -> None:
        trained.zero_grad()
        trained(ids, labels=ids, engine=engine).loss.backward()

    return _engines(machine, step, 2.0 if machine.gpu else 1.2)


def prefill(machine: Machine) -> dict[str, Any]:
    reader, ids = machine.model().eval(), machine.tokens()

    @torch.no_grad()
    def read(engine: str) -> None:
        reader(ids, engine=engine, logits_to_keep=1)

    return _engines(machine, read, 1.5 if machine.gpu else 1.2)


def _engines(machine: Machine, job: Callable[[str], None], least: float) -> dict[str, Any]:
    parallel, loop = machine.seconds(lambda: job("parallel"), lambda: job("loop"))
    speedup = loop / parallel
    return judged({"loop": loop, "parallel": parallel, "speedup": speedup}, f"speedup >= {least}", speedup >= least)


@torch.no_grad()
def prefill_flops(machine: Machine) -> dict[str, Any]:
    """Products with weights, attention excluded, beside the least that the method needs."""
    reader, ids = machine.model().eval(), machine.tokens()
    with FlopCounterMode(display=False) as counter:
        cache = reader(ids, logits_to_keep=1).past_key_values
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    square = HIDDEN * HIDDEN
    layer, stored, beacons = 4 * square + 3 * 4 * square, cache.nbytes // (2 * LAYERS * HIDDEN * 4), machine.length // RATIO
    floor = (
        2 * layer * (machine.length + beacons) * (LAYERS - 1)
        + 2 * 2 * square * stored
        + 2 * (2 * square + 12 * square + HIDDEN * VOCABULARY)
    )
    return judged({"flops": counted, "floor": floor, "ratio": counted / floor}, "ratio <= 1.05", counted / floor <= 1.05)


@torch.no_grad()
def kv_bytes(machine: Machine) -> dict[str, Any]:
    """Bytes held after any length, beside the formula."""
    wrong, cache, window = 0, None, machine.window
    reader = machine.model(sink_size=4).eval()
    for n in (1, window - 1, window, window + 1, 3 * window + 7, machine.length):
        cache = reader.compress(machine.tokens(n))
        count = n // window
        entries = (4 if count else 0) + count * window // RATIO + n - count * window
        wrong += cache.nbytes != 2 * LAYERS * HIDDEN * 4 * entries
    assert cache is not None
    found = {"bytes": cache.nbytes, "full_attention": 2 * LAYERS * HIDDEN * 4 * machine.length, "lengths_off_the_formula": wrong}
    return judged(found, "no length off the formula", wrong == 0)


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that operators make anew."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in held:
                self.bytes += x.untyped_storage().nbytes()
        return out


@torch.no_grad()
def decode_bytes(machine: Machine) -> dict[str, Any]:
    """Bytes that one decode step allocates with a long and with a short memory, beside the long memory's own."""
    reader, found = machine.model().eval(), {}
    for entries in (4096, 256):
        cache = reader.compress(machine.tokens(entries * RATIO + 1), ratios=[RATIO])
        with Allocated() as counter:
            reader(machine.tokens(1), past_key_values=cache)
        found[entries] = counter.bytes
    memory = 2 * LAYERS * HIDDEN * 4 * 4096
    share = (found[4096] - found[256]) / memory
    return judged({"bytes_4096": found[4096], "bytes_256": found[256], "memory": memory, "share": share}, "share < 0.01", share < 0.01)


@torch.no_grad()
def stream(machine: Machine) -> dict[str, Any]:
    """Bytes held, and allocated per window, while 200 windows stream through a bounded memory."""
    reader = machine.model(window=32, stride=32, memory_budget=64, on_budget="evict").eval()
    cache, held, made = reader.compress(machine.tokens(32)), [], []
    for _ in range(200):
        with Allocated() as counter:
            cache.append(machine.tokens(32))
        held.append(cache.nbytes)
        made.append(counter.bytes)
    growth = max(made[40:]) / made[40] - 1
    found = {"bytes": held[-1], "different_after_filling": len(set(held[40:])) - 1, "growth": growth}
    return judged(found, "no difference, growth < 0.01", len(set(held[40:])) == 1 and growth < 0.01)


@torch.no_grad()
def memory_operators(machine: Machine) -> dict[str, Any]:
    """Beacons appended to memory, and windows dropped from it, beside the same in plain PyTorch, keys and values of a head of 64."""
    from kernels_cuda.beacon import rope_evict_, rope_gather_append_
    from kernels_cuda.beacon.rope_evict_ import reference as evict
    from kernels_cuda.beacon.rope_gather_append_ import reference as append

    heads, size, held, new = 8, 64, 32768 if machine.gpu else 4096, 1024
    tokens = torch.randn(1, heads, 2 * new, size, device=machine.device)
    angle = torch.arange(held + 1, device=machine.device)[:, None] * 0.1 ** torch.linspace(0, 4, size // 2, device=machine.device)
    cos, sin, src = angle.cos(), angle.sin(), 2 * torch.arange(new, device=machine.device)[None]
    memory = torch.randn(2, 1, heads, held, size, device=machine.device)

    def number(value: int) -> torch.Tensor:
        return torch.full((1,), value, dtype=torch.int32, device=machine.device)

    spare = torch.empty_like(tokens)
    full, room, sink, gone = number(held), number(held - new), number(1), number(new)
    jobs = [
        lambda: rope_gather_append_(tokens, tokens, src, cos, sin, memory[0], memory[1], room.clone()),
        lambda: append.rope_gather_append_(tokens, tokens, src, cos, sin, memory[0], memory[1], room.clone()),
        lambda: rope_evict_(memory[0], memory[1], full.clone(), sink, gone, cos, sin),
        lambda: evict.rope_evict_(memory[0], memory[1], full.clone(), sink, gone, cos, sin),
        lambda: spare.copy_(tokens),
    ]
    # one job is too short for a clock
    times = 20
    ours, theirs, moved, plain, copied = (
        taken / times for taken in machine.seconds(*(lambda job=job: [job() for _ in range(times)] for job in jobs))
    )
    row = 2 * 2 * heads * size * 4
    speed = 2 * tokens.nbytes / copied
    found = {
        "append": ours,
        "append_speedup": theirs / ours,
        "append_of_copy": new * row / ours / speed,
        "evict": moved,
        "evict_speedup": plain / moved,
        "evict_of_copy": (held - new - 1) * row / moved / speed,
    }
    least = min(found["append_speedup"], found["evict_speedup"])
    if not machine.gpu:
        return judged(found, "speedups >= 1", least >= 1)
    share = min(found["append_of_copy"], found["evict_of_copy"])
    return judged(found, "speedups >= 2, at 0.6 of a copy's bandwidth", least >= 2 and share >= 0.6)


@torch.no_grad()
def decode_operator(machine: Machine) -> dict[str, Any]:
    """One token's attention over 16K entries and half a window of 1024, beside torch's, which wants keys joined and expanded; shapes of 8B."""
    from kernels_cuda.beacon import decode_attention

    heads, groups, size, held, near = 32, 8, 128, 16384 if machine.gpu else 4 * machine.length, 512
    kind = torch.bfloat16 if machine.gpu else torch.float32
    q = torch.randn(1, heads, 1, size, device=machine.device, dtype=kind)
    memory, window = (torch.randn(2, 1, groups, length, size, device=machine.device, dtype=kind) for length in (held, near))
    lengths = [torch.full((1,), length, dtype=torch.int32, device=machine.device) for length in (held, near)]

    def expanded() -> torch.Tensor:
        keys, values = (torch.cat(pair, 2).repeat_interleave(heads // groups, 1) for pair in zip(memory, window))
        return F.scaled_dot_product_attention(q, keys, values)

    spare = torch.empty_like(memory)
    ours, theirs, copied = machine.seconds(
        lambda: decode_attention(q, memory[0], memory[1], lengths[0], window[0], window[1], lengths[1], size**-0.5),
        expanded,
        lambda: spare.copy_(memory),
    )
    found = {"decode": ours, "expanded": theirs, "speedup": theirs / ours}
    if not machine.gpu:
        return judged(found, "speedup >= 3 (of a copy's bandwidth: on a GPU, as a CPU's cache holds a part)", theirs >= 3 * ours)
    found["of_copy"] = (memory.nbytes + window.nbytes) / ours / (2 * memory.nbytes / copied)
    return judged(found, "speedup >= 3, at 0.5 of a copy's bandwidth", theirs >= 3 * ours and found["of_copy"] >= 0.5)


@torch.no_grad()
def long_context(machine: Machine) -> dict[str, Any]:
    """Prefill of a long text beside its products at the measured rate, and beside full attention; 8B weights and 128K tokens on a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = (32, 4096, 14336, 32, 8, 128256) if machine.gpu else (LAYERS, HIDDEN, 4 * HIDDEN, 4, 2, VOCABULARY)
    layers, hidden, inner, heads, groups, vocabulary = shape
    n, w = (131072, 1024) if machine.gpu else (2 * machine.length, machine.window)
    kind = torch.bfloat16 if machine.gpu else torch.float32
    stock = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, max_position_embeddings=2 * n, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with machine.device, _default(kind):
        reader: Any = attach_beacon(LlamaForCausalLM(stock), BeaconConfig(window=w, stride=w, ratio=[RATIO])).eval()
    ids, held = machine.tokens(n, vocabulary), dict[str, int]()

    def read() -> None:
        held["beacon"] = reader(ids, logits_to_keep=1).past_key_values.nbytes

    def full() -> None:
        with reader.beacon_disabled():
            cache = reader(ids, logits_to_keep=1, use_cache=True).past_key_values
        held["full"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    square = torch.randn(4096 if machine.gpu else 1024, 4096 if machine.gpu else 1024, device=machine.device, dtype=kind)
    seconds, whole, product = machine.seconds(read, full, lambda: square @ square)
    b, d = w // RATIO, hidden // heads
    layer = 2 * hidden * hidden + 2 * hidden * d * groups + 3 * hidden * inner
    # every window: tokens and beacons over the memory before it, and over half of itself
    pairs = sum((w + b) * (i * b) + w * w / 2 + b * w / 2 + b * b / 2 for i in range(n // w))
    flops = layers * (2 * layer * (n + n // RATIO) + 4 * hidden * pairs)
    floor = flops * product / (2 * square.shape[0] ** 3)
    ratio = held["full"] / held["beacon"]
    found = {
        "prefill": seconds,
        "floor": floor,
        "full": whole,
        "times_floor": seconds / floor,
        "speedup": whole / seconds,
        "kv_ratio": ratio,
    }
    if not machine.gpu:
        return judged(found, "kv_ratio >= 7 (seconds: on a GPU)", ratio >= 7)
    met = ratio >= 7 and seconds <= 2 * floor and whole >= 1.6 * seconds
    return judged(found, "times_floor <= 2, speedup >= 1.6, kv_ratio >= 7", met)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MEASURES: dict[str, tuple[str, Callable[[Machine], dict[str, Any]]]] = {
    "P1": ("train step, all windows at once against one by one", train_step),
    "P2": ("prefill, all windows at once against one by one", prefill),
    "P3": ("products with weights of a prefill, beside the floor", prefill_flops),
    "P4": ("bytes of keys and values, beside the formula", kv_bytes),
    "P5": ("bytes allocated by a decode step, memory of 4096 against 256 entries, beside the long memory", decode_bytes),
    "P6": ("a bounded stream of 200 windows: bytes held, growth of bytes allocated per window", stream),
    "P7": ("operators that append to memory and drop from it, beside plain PyTorch", memory_operators),
    "P8": ("one token's attention over a long memory, beside joined and expanded keys", decode_operator),
    "P9": ("prefill of a long text beside its floor and beside full attention", long_context),
}
