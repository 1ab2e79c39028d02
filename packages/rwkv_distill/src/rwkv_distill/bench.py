"""What the specification promises as ratios, measured: operators against their references, decoding, memory of stage 1, packing."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lm_core.data.pack import BestFit, OneDocument
from lm_core.errors import ConfigError
from lm_core.figures import Figure, report
from lm_core.memory import peak_bytes, reset_peak
from lm_core.models import load_model
from lm_core.plot import COLOURS, MARKERS, drawing
from rwkv_distill import ops, reference
from rwkv_distill.align import AlignedLayers
from rwkv_distill.command_config import BenchConfig
from rwkv_distill.config import MODELS
from rwkv_distill.losses import kl
from rwkv_distill.student import StudentModel, load_student
from rwkv_distill.student_config import StudentConfig

SHAPE = 1, 512, 14, 64  # B, T, H, N
CONTEXTS = (64, 512, 2048, 8192)
CPU = torch.device("cpu")


def run(config: BenchConfig) -> dict[str, Any]:
    """Print each figure with its target as it is measured."""
    if config.figure is not None and config.op not in ("decode", "all"):
        raise ConfigError(f"figure: shows decoding, which --op {config.op} does not measure; leave it out or use --op decode")
    found = report(MEASUREMENTS, config, only=[] if config.op == "all" else [config.op], threads=1)
    if config.output is not None:
        config.output.write_text(json.dumps(found, indent=1) + "\n")
    if config.figure is not None:
        draw({figure["side"]: figure["contexts"] for figure in found["figures"] if figure["name"] == "decode"}, config.figure)
    return found


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The least processor time of `repeats` calls, after one to warm up."""
    function()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return min(found)


def wkv7(config: BenchConfig) -> Iterator[Figure]:
    """The operator against its definition: forward, forward and backward, one step."""
    torch.manual_seed(0)
    inputs = [torch.randn(SHAPE, requires_grad=True) for _ in range(6)]
    with torch.no_grad():
        inputs[4].copy_(-torch.nn.functional.normalize(inputs[4], dim=-1))
        inputs[5].copy_(-inputs[4] * torch.sigmoid(inputs[5]))

    def step(operator: Callable[..., Any]) -> None:
        operator(*one, state)

    one = [torch.randn(8, *SHAPE[2:]) for _ in range(6)]
    one[4], one[5] = inputs[4].detach()[0, :8], inputs[5].detach()[0, :8]
    state = torch.zeros(8, SHAPE[2], SHAPE[3], SHAPE[3])
    yield from recurrence(config, "wkv7", ops.wkv7, reference.wkv7, inputs, (20, 15))
    yield against(config, "wkv7", "one step of 8 rows", step, ops.wkv7_step, reference.wkv7_step, 3)


def wkv6(config: BenchConfig) -> Iterator[Figure]:
    """The operator of RWKV-6 in the same way."""
    torch.manual_seed(0)
    inputs = [torch.randn(SHAPE, requires_grad=True) for _ in range(4)]
    yield from recurrence(config, "wkv6", ops.wkv6, reference.wkv6, [*inputs, torch.randn(SHAPE[2:], requires_grad=True)], (15, 12))


def recurrence(
    config: BenchConfig, name: str, mine: Callable[..., Any], theirs: Callable[..., Any], inputs: list[Tensor], targets: tuple[int, int]
) -> Iterator[Figure]:
    """Forward, and forward and backward."""

    def both(operator: Callable[..., Any]) -> None:
        operator(*inputs)[0].sum().backward()

    def forward(operator: Callable[..., Any]) -> None:
        with torch.no_grad():
            operator(*inputs)

    yield against(config, name, "forward", forward, mine, theirs, targets[0])
    yield against(config, name, "forward and backward", both, mine, theirs, targets[1])


def against(
    config: BenchConfig,
    name: str,
    what: str,
    function: Callable[..., Any],
    mine: Callable[..., Any],
    theirs: Callable[..., Any],
    target: int,
) -> Figure:
    """How many times faster than its definition the operator is."""
    fast, slow = seconds(partial(function, mine), config.repeats), seconds(partial(function, theirs), max(1, config.repeats // 5))
    told = f"{what}: times faster than its definition, {1e3 * fast:.3g} of {1e3 * slow:.4g} ms"
    details = {"part": what, "shape": list(SHAPE), "milliseconds": 1e3 * fast, "reference_milliseconds": 1e3 * slow}
    return Figure(name, told, slow / fast, target, least=True, details=details)


def linear_kl(config: BenchConfig) -> Iterator[Figure]:
    """The fused head of stage 2 against full logits and autograd: processor time, and how much the peak of memory grows.

    Every measurement has a process of its own, so that none finds memory which an earlier one gave back.
    """
    for rows, memory, time_limit in ((1024, 0.30, 0.6), (4096, 0.15, None)):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            found = [pool.submit(kl_cost, fused, rows, max(1, config.repeats // 5)).result() for fused in (True, False)]
        (fast, small), (slow, large) = found
        details = {"rows": rows, "milliseconds": 1e3 * fast, "full_milliseconds": 1e3 * slow, "peak_kib": small, "full_peak_kib": large}
        told = f"{rows} rows: memory over full logits', {small / 1024:.0f} of {large / 1024:.0f} MiB"
        yield Figure("linear_kl", told, small / large, memory, details=details)
        yield Figure("linear_kl", f"{rows} rows: time over full logits', {1e3 * fast:.0f} of {1e3 * slow:.0f} ms", fast / slow, time_limit)


def kl_cost(fused: bool, rows: int, repeats: int, width: int = 128, columns: int = 32768) -> tuple[float, int]:
    """Seconds of one forward and backward, and KiB by which the peak of this process grew."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    h_s, h_t = (torch.randn(rows, width) for _ in range(2))
    w_s, w_t = (torch.randn(columns, width) / width**0.5 for _ in range(2))
    h_s.requires_grad_()
    w_s.requires_grad_()

    def run() -> None:
        h_s.grad = w_s.grad = None
        loss = ops.linear_kl(h_s, w_s, (h_t, w_t), chunk=128)[0] if fused else kl(h_s @ w_s.T, h_t @ w_t.T)
        loss.backward()

    # what is loaded and compiled once is no cost of a call
    ops.linear_kl(h_s[:2].detach(), w_s[:256].detach(), (h_t[:2], w_t[:256]), chunk=128)
    # not getrusage, whose peak a process takes over from the one that started it
    reset_peak(CPU)
    before = peak_bytes(CPU)
    return seconds(run, repeats), (peak_bytes(CPU) - before) // 1024


def decode(config: BenchConfig) -> Iterator[Figure]:
    """Time of one token and bytes remembered, behind contexts of several lengths: of the student, and of the teacher if it is named."""
    student: Any = (
        StudentModel.from_teacher(load_model("tiny", presets=MODELS), StudentConfig(head_size=32))
        if config.model is None
        else load_student(config.model)
    )
    sides = {"student": student}
    if config.teacher is not None:
        sides["teacher"] = load_model(config.teacher, presets=MODELS)
    for side, model in sides.items():
        contexts = _decode(model, config)
        first, last = ([*contexts.values()][at]["milliseconds"] for at in (0, -1))
        told = f"{side}: time of a token behind the longest context over the shortest's, {last:.3g} of {first:.3g} ms"
        yield Figure("decode", told, last / first, 1.1 if side == "student" else None, details={"side": side, "contexts": contexts})


@torch.no_grad()
def _decode(model: Any, config: BenchConfig) -> dict[str, Any]:
    model.train(False)
    found: dict[str, Any] = {}
    token = torch.ones(1, 1, dtype=torch.long)
    state = None
    seen = 0
    for context in (length for length in CONTEXTS if length <= config.context):
        while seen < context:
            # in pieces, so that prefilling needs little memory
            piece = token.expand(1, min(256, context - seen))
            state = model(piece, past_key_values=state, use_cache=True, logits_to_keep=1).past_key_values
            seen += piece.shape[1]
        reset_peak(CPU)
        before = peak_bytes(CPU)
        times = []
        for _ in range(config.tokens):
            began = time.process_time()
            state = model(token, past_key_values=state, use_cache=True).past_key_values
            times.append(time.process_time() - began)
            seen += 1
        grown = (peak_bytes(CPU) - before) // 1024
        found[str(context)] = {"milliseconds": 1e3 * statistics.median(times), "state_bytes": _bytes(state), "peak_grew_kib": grown}
    return found


def _bytes(state: Any) -> int:
    if hasattr(state, "bytes"):
        return int(state.bytes())
    return sum(tensor.nbytes for layer in state.layers for tensor in (layer.keys, layer.values))


def draw(sides: dict[str, Any], path: Path) -> None:
    """Milliseconds of a token and bytes remembered against the tokens before it."""
    with drawing(path) as figure:
        left, right = figure.subplots(1, 2)
        for place, side in enumerate(side for side in ("teacher", "student") if side in sides):
            contexts = sides[side]
            for axes, key, unit in ((left, "milliseconds", 1.0), (right, "state_bytes", 2.0**20)):
                values = [entry[key] / unit for entry in contexts.values()]
                axes.plot([int(length) for length in contexts], values, color=COLOURS[place], marker=MARKERS[place], label=side)
        left.set_ylabel("processor time of one token (ms)")
        right.set_ylabel("memory of the text (MiB)")
        for axes in (left, right):
            axes.set_xlabel("tokens before")
            axes.set_ylim(bottom=0)
            axes.legend()


def stage1(config: BenchConfig) -> Iterator[Figure]:
    """Bytes that autograd holds at most in stage 1, with 8 layers and with 2: layer by layer, and in one pass."""
    for what, local, target in (("layer by layer", True, 1.3), ("in one pass", False, 2.5)):
        deep, flat = (held_bytes(depth, local) for depth in (8, 2))
        told = f"{what}: bytes held for the backward pass with 8 layers over those with 2"
        yield Figure("stage1", told, deep / flat, target, least=not local, details={"bytes_8_layers": deep, "bytes_2_layers": flat})


def held_bytes(depth: int, local: bool) -> int:
    """The most bytes of saved tensors that are alive at one moment of a stage-1 step."""
    shape = {**MODELS["tiny"], "num_hidden_layers": depth}
    teacher: Any = load_model("deep", presets={"deep": shape})
    attentions = [layer.self_attn for layer in teacher.base_model.layers]
    layers = AlignedLayers(StudentModel.from_teacher(teacher, StudentConfig(head_size=32)), attentions)
    held: dict[int, int] = {}
    most = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal most
            self.tensor = tensor
            held[id(self)] = tensor.untyped_storage().nbytes()
            most = max(most, sum(held.values()))

        def __del__(self) -> None:
            held.pop(id(self), None)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        losses = []
        for _, loss in layers(torch.ones(2, 128, dtype=torch.long), local=local):
            if local:
                loss.backward()
            else:
                losses.append(loss)
        if losses:
            torch.stack(losses).sum().backward()
    return most


def pack(config: BenchConfig) -> Iterator[Figure]:
    """Unmasked tokens per second of a student's forward pass: rows packed by best fit against one padded document per row."""
    torch.manual_seed(0)
    size, rows = 128, 8
    # geometric lengths with a mean of a quarter of the row
    lengths = np.clip(np.random.default_rng(0).geometric(4 / size, 400), 2, size)
    documents = _Documents(lengths)
    student = StudentModel.from_teacher(load_model("tiny", presets=MODELS), StudentConfig(head_size=32))
    student.train(False)
    rates = {}
    for name, packed in (("pack", BestFit(documents, size)), ("pad", OneDocument(documents, size))):  # type: ignore[arg-type]
        batches = []
        for first in range(0, 4 * rows, rows):
            batch = packed.collate([packed[n] for n in range(first, first + rows)])
            if name == "pad" and batch["input_ids"].shape[1] < size:
                missing = size - batch["input_ids"].shape[1]
                batch = {key: torch.nn.functional.pad(value, (0, missing)) for key, value in batch.items()}
            batches.append(batch)
        real = sum(int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel() for b in batches)

        def forward(batches: list[dict[str, Tensor]] = batches) -> None:
            with torch.no_grad():
                for batch in batches:
                    student(batch["input_ids"], batch.get("attention_mask"), batch.get("document_ids"))

        rates[name] = real / seconds(forward, config.repeats)
    told = f"tokens/s of rows packed by best fit over one padded document per row, of a mean length of {lengths.mean() / size:.2f} rows"
    yield Figure("pack", told, rates["pack"] / rates["pad"], 2.5, least=True, details={"tokens_per_second": rates})


class _Documents:
    """Made-up documents of given lengths, as `lm_core.data.pack` reads them."""

    has_labels = False
    fingerprint = "bench"

    def __init__(self, length: Any) -> None:
        self.length = length
        self.tokens = int(length.sum())

    def __len__(self) -> int:
        return len(self.length)

    def read(self, document: int, first: int, last: int) -> Any:
        return np.arange(first, last) % 200

    labels = read


MEASUREMENTS: dict[str, Callable[[BenchConfig], Iterator[Figure]]] = {
    "wkv7": wkv7,
    "wkv6": wkv6,
    "linear_kl": linear_kl,
    "decode": decode,
    "stage1": stage1,
    "pack": pack,
}
