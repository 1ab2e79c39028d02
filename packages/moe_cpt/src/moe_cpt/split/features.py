"""What the feed-forward layers of a dense model see and do on a text, kept on disk or handed on as it comes."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lm_core.data import build_data
from lm_core.errors import InputError, reading

# layer -> inputs (R x D), gate, up and act (R x M), output (R x D)
Watch = Callable[[int, Mapping[str, Tensor]], None]


@contextmanager
def watching(dense: Any, watch: Watch) -> Iterator[None]:
    """Call `watch(layer, tensors)` for every feed-forward layer that runs inside; tensors are `inputs, gate, up, act, output`."""
    hooks, seen = [], dict[str, Tensor]()

    def keep(name: str, *, of_input: bool = False) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen[name] = (inputs[0] if of_input else output).flatten(0, -2)

        return hook

    def done(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            watch(layer, {**seen, "inputs": inputs[0].flatten(0, -2), "output": output.flatten(0, -2)})
            seen.clear()

        return hook

    for layer, block in enumerate(dense.model.layers):
        hooks.append(block.mlp.gate_proj.register_forward_hook(keep("gate")))
        hooks.append(block.mlp.up_proj.register_forward_hook(keep("up")))
        hooks.append(block.mlp.down_proj.register_forward_hook(keep("act", of_input=True)))
        hooks.append(block.mlp.register_forward_hook(done(layer)))
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def token_rows(data: Sequence[str], tokenizer: Any, *, text_column: str, length: int, tokens: int, batch: int = 1) -> list[Tensor]:
    """Token ids (rows x length) of training documents of data arguments, about `tokens` of them in all, shared evenly by the sources.

    What these sources hold out stays unseen, so a model may be judged on it that was made with these rows.
    """
    options = SimpleNamespace(
        data=list(data), eval_data=[], text_column=text_column, max_length=length, packing="stream", hold_out=0.05, shuffle=True, seed=0
    )
    sources: Mapping[str, Any] = build_data(options, tokenizer).train
    share = -(-tokens // len(sources))
    found = []
    for source in sources.values():
        rows = source.epoch(0)
        chosen = [torch.as_tensor(rows[k]["input_ids"]) for k in range(min(len(rows), -(-share // length)))]
        # a source of less than one row gives a shorter one
        whole = [row for row in chosen if len(row) == length] or chosen[:1]
        found += [torch.stack(whole[at : at + batch]) for at in range(0, len(whole), batch)]
    return found


def write_features(folder: Path, dense: Any, rows: Sequence[Tensor], what: Sequence[str]) -> int:
    """Write `layer_<i>.safetensors` with a bfloat16 tensor [tokens, d or m] per name in `what`; the bytes written.

    Files are laid out first and filled as the model runs, so memory does not grow with the tokens. An interruption leaves nothing
    under `folder`.
    """
    config = dense.config
    tokens = sum(row.numel() for row in rows)
    widths = {name: width_of(config, name) for name in what}
    with _completed(folder) as partial:
        files = [_layout(partial / f"layer_{layer}.safetensors", tokens, widths) for layer in range(config.num_hidden_layers)]
        filled = [0] * len(files)

        def watch(layer: int, tensors: Mapping[str, Tensor]) -> None:
            count = len(tensors["act"])
            for name in what:
                # numpy knows no bfloat16; the bits are what is stored
                files[layer][name][filled[layer] : filled[layer] + count] = tensors[name].to(torch.bfloat16).view(torch.int16).numpy()
            filled[layer] += count

        _run(dense, rows, watch)
        for tables in files:
            for table in tables.values():
                table.flush()
    return bytes_of(config, tokens, what)


# values of some tokens (R x M) to what is summed over tokens
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "coactivation": lambda a_RM: a_RM.abs().T @ a_RM.abs(),
    "rate": lambda a_RM: (a_RM > 0).float().sum(0),
    "energy": lambda a_RM: a_RM.square().sum(0),
}


def write_statistics(folder: Path, dense: Any, rows: Sequence[Tensor], what: Sequence[str], reduce: str) -> int:
    """Write `layer_<i>.safetensors` with the mean over tokens of one of STATISTICS, float32, as `<what>.<reduce>`; the bytes written."""
    sums: dict[tuple[int, str], Tensor] = {}
    tokens = sum(row.numel() for row in rows)

    def watch(layer: int, tensors: Mapping[str, Tensor]) -> None:
        for name in what:
            found = STATISTICS[reduce](tensors[name].float()) / tokens
            sums[layer, name] = sums[layer, name].add_(found) if (layer, name) in sums else found

    with _completed(folder) as partial:
        _run(dense, rows, watch)
        for layer in range(dense.config.num_hidden_layers):
            save_file({f"{name}.{reduce}": sums[layer, name] for name in what}, partial / f"layer_{layer}.safetensors")
    return bytes_of(dense.config, tokens, what, reduce)


@contextmanager
def _completed(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` at the end, and of which nothing stays after an interruption but `.tmp`."""
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _run(dense: Any, rows: Sequence[Tensor], watch: Watch) -> None:
    with watching(dense, watch):
        for row in rows:
            dense.model(row)


def width_of(config: Any, name: str) -> int:
    return int(config.hidden_size if name == "inputs" else config.intermediate_size)


def bytes_of(config: Any, tokens: int, what: Sequence[str], reduce: str = "none") -> int:
    """Size of all tensors that `write_features`, or with `reduce` `write_statistics`, writes."""
    widths = [width_of(config, name) for name in what]
    if reduce == "none":
        return 2 * tokens * sum(widths) * int(config.num_hidden_layers)
    return 4 * sum(width * (width if reduce == "coactivation" else 1) for width in widths) * int(config.num_hidden_layers)


def _layout(path: Path, tokens: int, widths: Mapping[str, int]) -> dict[str, Any]:
    """An empty safetensors file of the final size, and its tables, mapped."""
    header, at = dict[str, Any](), 0
    for name, width in widths.items():
        header[name] = {"dtype": "BF16", "shape": [tokens, width], "data_offsets": [at, at + 2 * tokens * width]}
        at += 2 * tokens * width
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    start = 8 + len(text)
    return {
        name: np.memmap(path, dtype=np.int16, mode="r+", offset=start + header[name]["data_offsets"][0], shape=(tokens, width))
        for name, width in widths.items()
    }


def read_features(folder: Path, layer: int, what: str, width: int) -> Tensor:
    """One table of one layer. Raises InputError when it is absent or of another model."""
    path = folder / f"layer_{layer}.safetensors"
    if not path.is_file():
        raise InputError(f"features: {path} is missing; write it with moe-cpt features --what {what}")
    with reading(f"features: {path}", f"write it with moe-cpt features --what {what}"), safe_open(path, framework="pt") as file:
        if what not in file.keys():  # noqa: SIM118 - no mapping
            raise InputError(f"features: {path} holds no {what}; write it with moe-cpt features --what {what}")
        table: Tensor = file.get_tensor(what)
    if table.ndim != 2 or table.shape[1] != width:
        raise InputError(f"features: {path} has {table.shape[-1]} columns, the model {width} neurons; write the features of this model")
    return table
