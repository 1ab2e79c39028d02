"""Perplexity by context length: the model through its memory, beside its base with full attention or with a short window only."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from beacon.attach import set_beacon
from beacon.config import BeaconConfig
from beacon.eval.folder import EvalFolder
from beacon.io import load_beacon, tokenizer_name
from beacon.modeling.causal_lm import given
from beacon.options import LmConfig, settings
from lm_core import dist
from lm_core.data import build_data
from lm_core.errors import InputError
from lm_core.models import load_tokenizer

# T tokens of a text, D hidden size
log = logging.getLogger(__name__)
CHUNK = 1024  # positions whose logits are held at a time


def run(config: LmConfig) -> dict[str, Any]:
    """Score every document; returns the content of `result.json`."""
    folder = EvalFolder(config.output_dir, config, config.overwrite)
    model = load_beacon(config.model).to(dist.init(config.device))
    set_beacon(model, settings(config, model.beacon))
    edges = bucket_edges(model.beacon.window, config.max_length)
    texts = [text for text in documents(config, tokenizer_name(config.model)) if len(text) >= max(2, config.min_length)]
    texts = texts[: config.max_sample_num]
    if not texts:
        raise InputError(
            f"eval_data: no document of {config.eval_data} has {max(2, config.min_length)} tokens; lower min_length, or give longer texts"
        )
    for number, text in enumerate(texts):
        if number in folder.items:
            continue
        item: dict[str, Any] = {"item": number, "tokens": len(text)}
        for reader in ("beacon", *config.baseline):
            item |= {f"{reader}/{name}": value for name, value in scored(model, reader, text, config, edges).items()}
        folder.add(item)
        log.info("document %d of %d: %d tokens, perplexity %.2f", number + 1, len(texts), len(text), math.exp(item["beacon/mean"]))
    items = [folder.items[number] for number in sorted(folder.items)]
    result = {reader: summary(items, reader, edges) for reader in ("beacon", *config.baseline)}
    folder.finish(
        {"documents": len(items), **result},
        ["item", "tokens", *(f"{reader}/{name}" for reader in result for name in ("mean", "seconds", "kv_bytes"))],
    )
    if config.output_dir is not None:
        draw(result, config.output_dir / "figures" / "lm.png")
    print(table(result))
    return {"documents": len(items), **result}


def documents(config: LmConfig, tokenizer: str) -> Iterator[Tensor]:
    """Token ids of the held-out documents: at most `max_length` of each for one pass, else all."""
    size = config.max_length if config.step == 0 else 1 << 30
    fields = {"data": config.eval_data, "eval_data": config.eval_data, "hold_out": 0.0, "max_length": size, "packing": config.packing}
    asked = SimpleNamespace(**fields, text_column=config.text_column, seed=config.seed, shuffle=False)
    for rows in build_data(asked, load_tokenizer(tokenizer)).valid.values():
        for k in range(len(rows)):
            yield torch.as_tensor(rows[k]["input_ids"])


def bucket_edges(window: int, length: int) -> list[int]:
    """Context lengths that are told apart: up to one window, two, four, and so on.

    >>> bucket_edges(256, 2048)
    [256, 512, 1024, 2048]
    """
    edges = [min(window, length)]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return edges


def passes(length: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Begin and end of each pass, and the first token that it scores anew.

    >>> list(passes(10, 4, 3)), list(passes(10, 4, 0))
    ([(0, 4, 1), (3, 7, 4), (6, 10, 7)], [(0, 4, 1)])
    """
    end = min(length, max_length)
    yield 0, end, 1
    while stride and end < length:
        before, end = end, min(length, end + stride)
        yield max(0, end - max_length), end, before


@torch.no_grad()
def scored(model: Any, reader: str, text: Tensor, config: LmConfig, edges: list[int]) -> dict[str, Any]:
    """Loss sums and counts by bucket of context length, the mean, seconds and bytes of keys and values."""
    sums, counts, kv, began = [0.0] * len(edges), [0] * len(edges), 0, time.perf_counter()
    for begin, end, first in passes(len(text), config.max_length, config.step):
        row = text[begin:end].to(model.device)
        loss, used = losses(model, reader, row, model.beacon, config)
        kv = max(kv, used)
        for position in range(first - begin, end - begin):
            bucket = next(number for number, edge in enumerate(edges) if position <= edge)
            sums[bucket] += float(loss[position - 1])
            counts[bucket] += 1
    return {"sums": sums, "counts": counts, "mean": sum(sums) / sum(counts), "seconds": time.perf_counter() - began, "kv_bytes": kv}


def losses(model: Any, reader: str, row_T: Tensor, beacon: BeaconConfig, config: LmConfig) -> tuple[Tensor, int]:
    """Loss of every token but the first, and bytes of keys and values that the reader holds at the end."""
    width = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim * model.dtype.itemsize
    if reader == "beacon":
        ratios = given(config.beacon_ratio) if len(config.beacon_ratio) == 1 else None
        hidden = model.read(row_T[None], ratios=ratios, seed=config.seed)
        return token_losses(model, hidden.states_BTD[0, :-1], row_T[1:]), hidden.cache.nbytes
    with model.beacon_disabled():
        if reader == "full":
            states = model.model(row_T[None], use_cache=False).last_hidden_state[0]
            return token_losses(model, states[:-1], row_T[1:]), width * len(row_T)
        # only the tokens since the start of the open window
        pieces, at, start = [], 0, 0
        while at < len(row_T):
            end = min(start + beacon.window, len(row_T))
            states = model.model(row_T[None, start:end], use_cache=False).last_hidden_state[0]
            pieces.append(states[at - start :])
            at, start = end, start + beacon.stride
        return token_losses(model, torch.cat(pieces)[:-1], row_T[1:]), width * min(beacon.window, len(row_T))


def token_losses(model: Any, states_TD: Tensor, targets_T: Tensor) -> Tensor:
    """Cross entropy of each target, a chunk of logits at a time."""
    parts = [
        F.cross_entropy(model.lm_head(states).float(), targets, reduction="none")
        for states, targets in zip(states_TD.split(CHUNK), targets_T.split(CHUNK))
    ]
    return torch.cat(parts)


def summary(items: list[dict[str, Any]], reader: str, edges: list[int]) -> dict[str, Any]:
    """Per-token and per-document perplexity, by bucket, with seconds and the largest bytes of keys and values."""
    sums = [math.fsum(item[f"{reader}/sums"][number] for item in items) for number in range(len(edges))]
    counts = [sum(item[f"{reader}/counts"][number] for item in items) for number in range(len(edges))]
    return {
        "perplexity": math.exp(math.fsum(sums) / sum(counts)),
        "document_perplexity": math.exp(math.fsum(item[f"{reader}/mean"] for item in items) / len(items)),
        "by_context": {str(edge): math.exp(total / count) for edge, total, count in zip(edges, sums, counts) if count},
        "tokens": sum(counts),
        "seconds": sum(item[f"{reader}/seconds"] for item in items),
        "kv_bytes": max(item[f"{reader}/kv_bytes"] for item in items),
    }


def table(result: dict[str, Any]) -> str:
    """Perplexity by context length, one column per reader."""
    readers = list(result)
    lines = [f"{'context up to':>14}" + "".join(f"{reader:>12}" for reader in readers)]
    lines += [
        f"{edge:>14}" + "".join(f"{result[reader]['by_context'][edge]:12.3f}" for reader in readers)
        for edge in result["beacon"]["by_context"]
    ]
    lines.append(f"{'all':>14}" + "".join(f"{result[reader]['perplexity']:12.3f}" for reader in readers))
    lines.append(f"{'KV MiB':>14}" + "".join(f"{result[reader]['kv_bytes'] / 2**20:12.2f}" for reader in readers))
    lines.append(f"{'seconds':>14}" + "".join(f"{result[reader]['seconds']:12.2f}" for reader in readers))
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Perplexity over context length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for reader, scores in result.items():
        axes.plot([int(edge) for edge in scores["by_context"]], list(scores["by_context"].values()), marker="o", label=reader)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("context length (tokens, up to)")
    axes.set_ylabel("perplexity")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
