"""What the commands beside training do: compress, generate, inspect, export, import."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from beacon.attach import attach_beacon, set_beacon
from beacon.cache import BeaconCache
from beacon.config import BeaconConfig
from beacon.io import ADAPTER, load_beacon, model_folder, save_adapter, tokenizer_name
from beacon.memory_file import describe
from beacon.modeling.weights import is_beacon
from beacon.options import CompressConfig, ExportConfig, GenerateConfig, ImportConfig, ReadOptions, settings
from lm_core import dist
from lm_core.data.sources import parse, resolve
from lm_core.data.tokenize import text_of
from lm_core.errors import InputError, reading
from lm_core.models import load_tokenizer, quiet

log = logging.getLogger(__name__)


def reader(config: ReadOptions) -> tuple[Any, Any]:
    """The model with the asked settings, and its tokenizer."""
    model = load_beacon(config.model).to(dist.init(config.device))
    set_beacon(model, settings(config, model.beacon))
    return model, load_tokenizer(tokenizer_name(config.model))


def compress(config: CompressConfig) -> dict[str, Any]:
    """Read the texts into one memory and save it."""
    texts = list(_texts(config))
    model, tokenizer = reader(config)
    ids = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
    began = time.perf_counter()
    cache = model.compress(ids, expected_length=config.expected_length, seed=config.seed)
    seconds = time.perf_counter() - began
    cache.save(config.output)
    found = {**cache.lengths()[0], "ratio": cache.compression_ratio()[0], "bytes": cache.nbytes, "seconds": seconds}
    print(
        f"{config.output}: {found['seen']:,} tokens in {found['sink'] + found['memory']:,} memory entries and {found['raw']} raw tokens, "
        f"{found['ratio']:.2f} tokens per entry, {cache.nbytes / 2**20:.2f} MiB, {seconds:.1f} s"
    )
    return found


def _texts(config: CompressConfig) -> Iterator[str]:
    for argument in (parse(text) for text in config.input):
        corpus = resolve(argument)
        if corpus.folder is not None:
            raise InputError(f"input: {argument.source} holds tokens, not text; name a text")
        for number, row in enumerate(corpus.rows()):
            if number == argument.samples:
                break
            if text := text_of(row, config.text_column):
                yield text


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Print the prompt's continuation."""
    model, tokenizer = reader(config)
    prompt = config.prompt if config.prompt is not None else _read(config.prompt_file)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=config.memory is None)["input_ids"]], device=model.device)
    cache = None if config.memory is None else BeaconCache.load(config.memory, model)
    sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p} if config.do_sample else {"do_sample": False}
    streamer = None
    if config.stream:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True)
    torch.manual_seed(config.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=config.max_new_tokens, seed=config.seed, streamer=streamer, pad_token_id=pad, **sampling
    )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    if not config.stream:
        print(prompt + text)
    return {"text": text, "tokens": out.shape[1] - ids.shape[1]}


def _read(path: Path | None) -> str:
    if path is None or not path.is_file():
        raise InputError(f"prompt_file: {path} does not exist; name a text file, or use --prompt")
    with reading(f"prompt_file: {path}", "name a text file, or use --prompt"):
        return path.read_text(encoding="utf-8")


def inspect(path: Path) -> None:
    """Print what a folder or a memory file holds."""
    if path.is_file():
        about = describe(path)
        print(f"memory file of {len(about['rows'])} row(s), {path.stat().st_size / 2**20:.2f} MiB, weights {about['weights'][:12]}")
        for number, row in enumerate(about["rows"]):
            print(f"row {number}: {row['seen']} tokens seen, {len(row['ratios'])} windows compacted, ratios {row['ratios'][:8]}")
        beacon = about["beacon"]
    else:
        folder = Path(model_folder(str(path)))
        if not (folder / "config.json").is_file():
            raise InputError(f"model: {folder} has no config.json; name a run folder, a model folder or a memory file")
        config = json.loads((folder / "config.json").read_text())
        if not config.get("beacon"):
            raise InputError(f"model: {folder} has no beacons (model_type {config.get('model_type')}); name a beacon folder")
        form = "beacon weights alone" if (folder / ADAPTER).is_file() else "the whole model"
        print(f"{folder}: {config['model_type']}, {config['num_hidden_layers']} layers, {form}")
        beacon = config["beacon"]
    for name, value in beacon.items():
        print(f"  {name}: {value}")


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the model in the asked form, its tokenizer beside it."""
    _empty(config.output_dir)
    model = load_beacon(config.model)
    if config.format == "full":
        model.save_format = ("full", "")
        with quiet():
            model.save_pretrained(config.output_dir)
    else:
        save_adapter(config.output_dir, model, model.state_dict(), config.base or _base_of(config.model))
        model.config.save_pretrained(config.output_dir)
    load_tokenizer(tokenizer_name(config.model)).save_pretrained(config.output_dir)
    print(f"{config.output_dir}: {config.format}")
    return {"output_dir": str(config.output_dir), "format": config.format}


def _base_of(name: str) -> str:
    """The base model that a run or an adapter names."""
    folder = Path(model_folder(name))
    if (folder / ADAPTER).is_file():
        return str(json.loads((folder / ADAPTER).read_text())["base"])
    run = Path(name) / "config.yaml"
    if run.is_file():
        from lm_core.config import load

        return str(load(run)["model"])
    raise InputError(f"base: {name} does not say what it was trained from; name the base model with --base")


def _empty(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"output_dir: {folder} is not empty; choose another folder")


def import_folder(config: ImportConfig) -> dict[str, Any]:
    """Our layout from a folder whose config.json holds flat beacon_* keys and whose tensors have our names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _empty(config.output_dir)
    path = config.source / "config.json"
    if not path.is_file():
        raise InputError(f"from: {config.source} has no config.json; name a folder of a beacon model")
    values = json.loads(path.read_text())
    names = BeaconConfig.__dataclass_fields__
    flat = {name: values.pop(f"beacon_{name}") for name in names if f"beacon_{name}" in values}
    if not flat:
        raise InputError(f"from: {path} has no beacon_* settings; name a folder of a beacon model")
    # such folders name their own modeling code, which is not needed here
    for name in [name for name in values if name.startswith("beacon_") or name == "auto_map"]:
        values.pop(name)
    weights = _tensors(config.source)
    found = AutoConfig.for_model(**{**values, "model_type": values["model_type"].removeprefix("beacon_")})
    kind = next(iter(weights.values())).dtype
    factory: Any = AutoModelForCausalLM
    model = attach_beacon(
        factory.from_config(found, dtype=kind),
        BeaconConfig.from_dict({"stride": flat.get("window", 1024), **flat}),
    )
    model.load_beacon_state_dict({name: tensor for name, tensor in weights.items() if is_beacon(name)})
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys) if hasattr(model, "all_tied_weights_keys") else set()
    if wrong := [*unexpected, *(name for name in missing if name not in tied)]:
        raise InputError(f"from: the tensors of {config.source} do not fit at {wrong[0]}; import a folder with our tensor names")
    with quiet():
        model.save_pretrained(config.output_dir)
    for file in config.source.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "generation_config")):
            shutil.copy(file, config.output_dir)
    print(f"{config.output_dir}: {sum(map(is_beacon, weights))} beacon tensors, {len(weights)} in all")
    return {"output_dir": str(config.output_dir), "tensors": len(weights)}


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with reading(f"from: {folder}", "name a folder with weights"):
        for file in sorted(folder.glob("*.safetensors")):
            found |= load_file(file)
        for file in [] if found else sorted(folder.glob("pytorch_model*.bin")):
            found |= torch.load(file, map_location="cpu", weights_only=True)
    if not found:
        raise InputError(f"from: {folder} holds neither safetensors nor pytorch_model.bin; name a folder with weights")
    return found
