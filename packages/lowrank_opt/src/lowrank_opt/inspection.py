"""`lowrank-opt inspect`: what the optimizer state of a checkpoint consists of. Reads no tensor's values."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from lm_core.errors import InputError
from lowrank_opt import saved
from lowrank_opt.commands import InspectConfig


def tensors(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Shape, dtype and bytes of every state tensor in a checkpoint, the whole of those that are shared out."""
    path = checkpoint / "optimizer.safetensors"
    if not path.is_file():
        return shared_tensors(checkpoint / "optimizer")
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries: dict[str, dict[str, Any]] = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    places = {name: entry.pop("data_offsets") for name, entry in entries.items()}
    return {name: {**entry, "bytes": places[name][1] - places[name][0]} for name, entry in entries.items()}


def shared_tensors(folder: Path) -> dict[str, dict[str, Any]]:
    """The same from torch's distributed checkpoint, which the sharded engine writes."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    words = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    kinds = {name: (entry.size, entry.properties.dtype) for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
    return {
        name: {"dtype": words[dtype], "shape": list(size), "bytes": size.numel() * dtype.itemsize}
        for name, (size, dtype) in sorted(kinds.items())
    }


def run(config: InspectConfig) -> dict[str, Any]:
    """State tensors by parameter, their bytes, and for low-rank parameters side, refreshes and age of the basis."""
    checkpoint = saved.newest(config.checkpoint)
    if not (checkpoint / "optimizer.json").is_file():
        raise InputError(f"checkpoint: {checkpoint} keeps no optimizer state (--keep-optimizer); name a newer one")
    info = json.loads((checkpoint / "optimizer.json").read_text())
    parameters: dict[str, dict[str, Any]] = {
        name: {"tensors": {}, "bytes": 0, **described(values)} for name, values in info["state"].items()
    }
    for path, entry in tensors(checkpoint).items():
        name, _, key = path.rpartition("/")
        parameters[name]["tensors"][key] = entry
        parameters[name]["bytes"] += entry["bytes"]
    for name, values in parameters.items():
        age = f"  side {values['side']}  refreshes {values['refreshes']}  age {values['age']}" if "side" in values else ""
        print(f"{name}  {values['bytes']:,} bytes{age}")
        for key, tensor in values["tensors"].items():
            print(f"    {key:20} {tensor['dtype']:5} {'x'.join(map(str, tensor['shape']))}  {tensor['bytes']:,} bytes")
    total = sum(values["bytes"] for values in parameters.values())
    print(f"{info['class'].rpartition('.')[2]}: {len(parameters)} parameters, {total:,} bytes")
    return {"checkpoint": str(checkpoint), "class": info["class"], "bytes": total, "parameters": parameters}


def described(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter's state that say where it stands."""
    found: dict[str, Any] = {"step": values.get("step")}
    if "side" in values:
        found |= {"side": values["side"], "refreshes": values["refreshes"], "age": values["step"] - values["refresh_step"]}
        found |= {"next_refresh": values["next_refresh"], "gap": values["gap"]}
    return found
