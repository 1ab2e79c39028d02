"""Ratios that the method should keep, each beside its floor or its baseline: `beacon bench --only P1,P2`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from beacon.attach import attach_beacon
from beacon.config import BeaconConfig
from beacon.options import BenchConfig

LENGTH, WINDOW, RATIO, HIDDEN, LAYERS, VOCABULARY = 4096, 512, 8, 256, 4, 512


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure what was asked for; prints one line each."""
    torch.set_num_threads(config.threads)
    results: dict[str, Any] = {}
    asked: list[str] = [*config.only] or [*MEASURES]
    for name in asked:
        title, measure = MEASURES[name]
        torch.manual_seed(config.seed)
        results[name] = measure(config.repeats)
        values = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in results[name].items())
        print(f"{name}  {title}: {values}")
    return results


def model(**config: Any) -> Any:
    """A random llama of the measured shape, with beacons."""
    from transformers import LlamaConfig, LlamaForCausalLM

    stock = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=65536, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    settings = {"window": WINDOW, "stride": WINDOW, "ratio": [RATIO], **config}
    return attach_beacon(LlamaForCausalLM(stock), BeaconConfig(**settings))


def tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1, length))


def compared(one: Callable[[], Any], other: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Median processor seconds of both, taking turns, and their ratio."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 1):
        for job, seconds in zip((one, other), taken):
            began = time.process_time()
            job()
            # the first turn warms up
            if number:
                seconds.append(time.process_time() - began)
    first, second = (statistics.median(seconds) for seconds in taken)
    return {"loop": second, "parallel": first, "speedup": second / first}


def train_step(repeats: int) -> dict[str, Any]:
    trained, ids = model().train(), tokens()

    def step(engine: str) -> None:
        trained.zero_grad()
        trained(ids, labels=ids, engine=engine).loss.backward()

    return compared(lambda: step("parallel"), lambda: step("loop"), repeats)


def prefill(repeats: int) -> dict[str, Any]:
    reader, ids = model().eval(), tokens()

    @torch.no_grad()
    def read(engine: str) -> None:
        reader(ids, engine=engine, logits_to_keep=1)

    return compared(lambda: read("parallel"), lambda: read("loop"), repeats)


@torch.no_grad()
def prefill_flops(repeats: int) -> dict[str, Any]:
    """Products with weights, attention excluded, beside the least that the method needs."""
    reader, ids = model().eval(), tokens()
    with FlopCounterMode(display=False) as counter:
        cache = reader(ids, logits_to_keep=1).past_key_values
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    square = HIDDEN * HIDDEN
    layer, stored, beacons = 4 * square + 3 * 4 * square, cache.nbytes // (2 * LAYERS * HIDDEN * 4), LENGTH // RATIO
    floor = 2 * layer * (LENGTH + beacons) * (LAYERS - 1) + 2 * 2 * square * stored + 2 * (2 * square + 12 * square + HIDDEN * VOCABULARY)
    return {"flops": counted, "floor": floor, "ratio": counted / floor}


@torch.no_grad()
def kv_bytes(repeats: int) -> dict[str, Any]:
    """Bytes held after any length, beside the formula."""
    wrong, cache = 0, None
    reader = model(sink_size=4).eval()
    for n in (1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 7, LENGTH):
        cache = reader.compress(tokens(n))
        count = n // WINDOW
        entries = (4 if count else 0) + count * WINDOW // RATIO + n - count * WINDOW
        wrong += cache.nbytes != 2 * LAYERS * HIDDEN * 4 * entries
    assert cache is not None
    return {"bytes": cache.nbytes, "full_attention": 2 * LAYERS * HIDDEN * 4 * LENGTH, "lengths_off_the_formula": wrong}


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
def decode_bytes(repeats: int) -> dict[str, Any]:
    """Bytes that one decode step allocates with a long and with a short memory, beside the long memory's own."""
    reader, found = model().eval(), {}
    for entries in (4096, 256):
        cache = reader.compress(tokens(entries * RATIO + 1), ratios=[RATIO])
        with Allocated() as counter:
            reader(tokens(1), past_key_values=cache)
        found[entries] = counter.bytes
    memory = 2 * LAYERS * HIDDEN * 4 * 4096
    return {"bytes_4096": found[4096], "bytes_256": found[256], "memory": memory, "share": (found[4096] - found[256]) / memory}


@torch.no_grad()
def stream(repeats: int) -> dict[str, Any]:
    """Bytes held while 200 windows stream through a bounded memory."""
    reader = model(window=32, stride=32, memory_budget=64, on_budget="evict").eval()
    cache, held = reader.compress(tokens(32)), []
    for _ in range(200):
        cache.append(tokens(32))
        held.append(cache.nbytes)
    return {"bytes": held[-1], "different_after_filling": len(set(held[40:])) - 1}


MEASURES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "P1": ("train step, processor seconds, all windows at once against one by one", train_step),
    "P2": ("prefill, processor seconds, all windows at once against one by one", prefill),
    "P3": ("products with weights of a prefill, beside the floor", prefill_flops),
    "P4": ("bytes of keys and values, beside the formula", kv_bytes),
    "P5": ("bytes allocated by a decode step, memory of 4096 against 256 entries (difference at most 0.01 of the memory)", decode_bytes),
    "P6": ("bytes of a bounded stream of 200 windows", stream),
}
