"""Ratios that the method should keep, each beside its floor or baseline and its target: `beacon bench --only P1,P2`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from lm_core.figures import Figure, report

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
    """Print each figure with its target as it is measured."""
    machine = Machine(dist.init(config.device), config.repeats)

    def seeded(measure: Callable[[Machine], Iterator[Figure]], _: BenchConfig) -> Iterator[Figure]:
        torch.manual_seed(config.seed)
        return measure(machine)

    return report({name: partial(seeded, measure) for name, measure in MEASURES.items()}, config, only=config.only, threads=config.threads)


def train_step(machine: Machine) -> Iterator[Figure]:
    trained, ids = machine.model().train(), machine.tokens()

    def step(engine: str) -> None:
        trained.zero_grad()
        trained(ids, labels=ids, engine=engine).loss.backward()

    yield _engines("P1", "a train step", machine, step, 2.0 if machine.gpu else 1.2)


def prefill(machine: Machine) -> Iterator[Figure]:
    reader, ids = machine.model().eval(), machine.tokens()

    @torch.no_grad()
    def read(engine: str) -> None:
        reader(ids, engine=engine, logits_to_keep=1)

    yield _engines("P2", "a prefill", machine, read, 1.5 if machine.gpu else 1.2)


def _engines(name: str, what: str, machine: Machine, job: Callable[[str], None], least: float) -> Figure:
    parallel, loop = machine.seconds(lambda: job("parallel"), lambda: job("loop"))
    return _faster(name, f"{what} of all windows at once, than of one by one", parallel, loop, least)


def _faster(name: str, what: str, ours: float, theirs: float, least: float | None) -> Figure:
    told = f"times faster: {what} ({1e3 * ours:.4g} and {1e3 * theirs:.4g} ms)"
    return Figure(name, told, theirs / ours, least, least=True, details={"seconds": ours, "baseline_seconds": theirs})


@torch.no_grad()
def prefill_flops(machine: Machine) -> Iterator[Figure]:
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
    told = "operations of a prefill's products with weights over the least that the method needs"
    yield Figure("P3", told, counted / floor, 1.05, details={"flops": counted, "floor": floor})


@torch.no_grad()
def kv_bytes(machine: Machine) -> Iterator[Figure]:
    """Bytes held after any length, beside the formula."""
    wrong, cache, window = 0, None, machine.window
    reader = machine.model(sink_size=4).eval()
    for n in (1, window - 1, window, window + 1, 3 * window + 7, machine.length):
        cache = reader.compress(machine.tokens(n))
        count = n // window
        entries = (4 if count else 0) + count * window // RATIO + n - count * window
        wrong += cache.nbytes != 2 * LAYERS * HIDDEN * 4 * entries
    assert cache is not None
    details = {"bytes": cache.nbytes, "full_attention": 2 * LAYERS * HIDDEN * 4 * machine.length}
    yield Figure("P4", "lengths of text whose keys and values take other bytes than the formula says", wrong, 0, details=details)


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
def decode_bytes(machine: Machine) -> Iterator[Figure]:
    """Bytes that one decode step allocates with a long and with a short memory, beside the long memory's own."""
    reader, found = machine.model().eval(), {}
    for entries in (4096, 256):
        cache = reader.compress(machine.tokens(entries * RATIO + 1), ratios=[RATIO])
        with Allocated() as counter:
            reader(machine.tokens(1), past_key_values=cache)
        found[entries] = counter.bytes
    memory = 2 * LAYERS * HIDDEN * 4 * 4096
    told = "bytes that a decode step allocates behind 4096 entries less those behind 256, over the bytes of 4096 entries"
    details = {"bytes_4096": found[4096], "bytes_256": found[256], "memory": memory}
    yield Figure("P5", told, (found[4096] - found[256]) / memory, 0.01, details=details)


@torch.no_grad()
def stream(machine: Machine) -> Iterator[Figure]:
    """Bytes held, and allocated per window, while 200 windows stream through a bounded memory."""
    reader = machine.model(window=32, stride=32, memory_budget=64, on_budget="evict").eval()
    cache, held, made = reader.compress(machine.tokens(32)), [], []
    for _ in range(200):
        with Allocated() as counter:
            cache.append(machine.tokens(32))
        held.append(cache.nbytes)
        made.append(counter.bytes)
    told = "a bounded stream of 200 windows, filled:"
    yield Figure("P6", f"{told} windows after which it holds other bytes", len(set(held[40:])) - 1, 0, details={"bytes": held[-1]})
    yield Figure("P6", f"{told} growth of the bytes allocated per window", max(made[40:]) / made[40] - 1, 0.01)


@torch.no_grad()
def memory_operators(machine: Machine) -> Iterator[Figure]:
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
    least, share = (2, 0.6) if machine.gpu else (1, None)
    for what, fast, slow, rows in (("append", ours, theirs, new), ("evict", moved, plain, held - new - 1)):
        yield _faster("P7", f"the operator that {what}s, than plain PyTorch", fast, slow, least)
        yield Figure("P7", f"the operator that {what}s: share of a copy's bandwidth", rows * row / fast / speed, share, least=True)


@torch.no_grad()
def decode_operator(machine: Machine) -> Iterator[Figure]:
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
    yield _faster("P8", "a token's attention over a long memory, than over joined and expanded keys", ours, theirs, 3)
    if machine.gpu:  # a CPU's cache holds a part
        of_copy = (memory.nbytes + window.nbytes) / ours / (2 * memory.nbytes / copied)
        yield Figure("P8", "a token's attention: share of a copy's bandwidth", of_copy, 0.5, least=True)


@torch.no_grad()
def long_context(machine: Machine) -> Iterator[Figure]:
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
    yield Figure("P9", "bytes of keys and values: full attention's over ours", held["full"] / held["beacon"], 7, least=True, details=held)
    told = f"prefill of {n} tokens over the time of its products at the measured rate ({1e3 * floor:.4g} ms)"
    yield Figure("P9", told, seconds / floor, 2 if machine.gpu else None)
    yield _faster("P9", f"prefill of {n} tokens, than by full attention", seconds, whole, 1.6 if machine.gpu else None)


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MEASURES: dict[str, Callable[[Machine], Iterator[Figure]]] = {
    "P1": train_step,
    "P2": prefill,
    "P3": prefill_flops,
    "P4": kv_bytes,
    "P5": decode_bytes,
    "P6": stream,
    "P7": memory_operators,
    "P8": decode_operator,
    "P9": long_context,
}
