"""A memory on disk: keys, values and cursors as safetensors, with a header that says whose they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from beacon.cache import BeaconCache
from beacon.config import BeaconConfig
from beacon.errors import CacheError
from beacon.plan import Cursor, Entries
from beacon.ratios import Rule

FORMAT_VERSION = 1
# settings that may differ between who wrote a memory and who reads it
CHANGEABLE = (
    "ratio",
    "ratio_mix",
    "inference_ratio_mix",
    "memory_budget",
    "on_budget",
    "on_capacity",
    "prefill_block_windows",
    "attn_backend",
)


def save(cache: BeaconCache, path: Path) -> None:
    """Write `path` as a whole: first beside it, then by rename."""
    tensors: dict[str, Tensor] = {}
    for part, pairs in (("memory", cache.memory), ("open", cache.open)):
        for layer, pair in enumerate(pairs):
            if pair is not None:
                tensors |= {f"layers.{layer}.{part}.{letter}": x.detach().contiguous().cpu() for letter, x in zip("kv", pair)}
    rows = []
    for number, cursor in enumerate(cache.cursors):
        for part, entries in (("memory", cursor.memory), ("open", cursor.open)):
            tensors[f"rows.{number}.{part}"] = torch.from_numpy(np.stack(entries.columns()[:3]))
        rows.append(
            {"seen": cursor.seen, "ratios": cursor.ratios, "before": cursor.before, "sizes": cursor.sizes, "rule": vars(cursor.ratio)}
        )
    about = {
        "format_version": FORMAT_VERSION,
        "beacon": cache.model.config.beacon,
        "weights": weights_hash(cache.model),
        "rotated": True,  # memory keys; those of the open window are not
        "columns": cache.columns,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata={"format": "pt", "beacon": json.dumps(about)})
    partial.rename(path)


def describe(path: Path) -> dict[str, Any]:
    """The header of a memory file. Raises CacheError when it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["beacon"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CacheError(f"memory: {path} is no memory file ({error}); write one with beacon compress") from error
    if about.get("format_version") != FORMAT_VERSION:
        raise CacheError(
            f"memory: {path} has format {about.get('format_version')}, this version reads {FORMAT_VERSION}; compress the text again"
        )
    return about


def load(path: Path, model: Any) -> BeaconCache:
    about = describe(path)
    if about["weights"] != weights_hash(model):
        raise CacheError(f"memory: {path} was written by a model with other weights; load that model, or compress the text again")
    for name, value in about["beacon"].items():
        # ratios may change while a text is read, geometry may not
        if name not in CHANGEABLE and model.config.beacon[name] != value:
            raise CacheError(
                f"memory: {path} was written with {name} {value}, the model has {model.config.beacon[name]}; use the same settings"
            )
    config = BeaconConfig.from_dict(model.config.beacon)
    with safe_open(path, framework="pt") as file:
        cursors = []
        for number, row in enumerate(about["rows"]):
            rule = Rule(**{**row["rule"], "ratios": tuple(row["rule"]["ratios"])})
            cursor = Cursor(config, rule, None, model.sliding_window(), model.positions)
            cursor.seen, cursor.ratios, cursor.before = row["seen"], list(row["ratios"]), row["before"]
            cursor.compactions, cursor.sizes = len(cursor.ratios), list(row["sizes"])
            for part in ("memory", "open"):
                kind, place, document = file.get_tensor(f"rows.{number}.{part}").numpy()
                setattr(cursor, part, Entries(kind, place, document, np.arange(len(kind))))
            cursors.append(cursor)
        cache = BeaconCache(cursors, model)
        cache.columns = about["columns"]
        names = set(file.keys())
        for part, pairs in (("memory", cache.memory), ("open", cache.open)):
            for layer in range(len(pairs)):
                if f"layers.{layer}.{part}.k" in names:
                    k, v = (file.get_tensor(f"layers.{layer}.{part}.{letter}").to(model.device, model.dtype) for letter in "kv")
                    pairs[layer] = (k, v)
    return cache


def weights_hash(model: Any) -> str:
    """SHA-256 of the beacon weights, and of the first values of the others."""
    from beacon.io import fingerprint
    from beacon.modeling.weights import is_beacon

    total = hashlib.sha256(fingerprint({name: x for name, x in model.state_dict().items() if not is_beacon(name)}).encode())
    for name, tensor in sorted(model.beacon_state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
