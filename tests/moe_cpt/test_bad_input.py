"""Every bad input that the specification lists, as a user meets it: the exit code, and field, value and fix in the message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_core.data.shards import Document, ShardWriter
from moe_cpt.convert import convert
from moe_cpt.split import Split, split_ffn
from tests.moe_cpt.small import dense_folder
from tests.moe_cpt.test_commands import call

TEXT = "one two three four five six seven eight nine ten " * 4
LINES = [json.dumps({"text": f"{n} {TEXT}"}) for n in range(60)]
SOURCES = ("github", "en_book")
RUN = ("--warmup", 0, "--no-tensorboard", "--precision", "fp32", "--micro_batch_size", 2)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, mixtures and sources of it, and a run of two steps that can be resumed."""
    root = tmp_path_factory.mktemp("bad")
    dense = dense_folder(root / "dense")
    split = split_ffn(dense, "random", num_experts=8)
    split.save(root / "split.safetensors")
    convert(dense, split, root / "mlp")
    convert(dense, split, root / "linear", gate_network="linear")
    routed, shared_part = [layer[:6] for layer in split.indices], [layer[6:].flatten() for layer in split.indices]
    shared = Split("random", routed, 64, split.model_hash, split.seed, {}, shared_part)
    convert(dense, shared, root / "shared", gate_network="linear")
    for name in SOURCES:
        sources(root / "data", *LINES, name=name)
    call("train", *trained(root), "-o", root / "run", "--save_every", 1, "--eval_every", "never")
    return root


def trained(here: Path, model: Path | None = None, data: Path | None = None, length: int = 32, steps: int = 2) -> tuple[object, ...]:
    return ("--model", model or here / "mlp", "--data", data or here / "data", "--max_length", length, "--max_steps", steps, *RUN)


def converted(here: Path) -> tuple[object, ...]:
    return ("convert", "--model_path", here / "dense", "--save_path", here / "never", "--split_file_path", here / "split.safetensors")


def changed_model(here: Path, to: Path, **fields: Any) -> Path:
    """The dense model with another config.json."""
    to.mkdir()
    for file in (here / "dense").iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    stored = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(stored | fields))
    return to


def split_of(here: Path, to: Path, change: Callable[[torch.Tensor], object]) -> Path:
    """The split with other neurons in its second layer."""
    split = Split.load(here / "split.safetensors")
    change(split.indices[1])
    split.save(to)
    return to


def sources(to: Path, *lines: str, name: str = "github") -> Path:
    (to / name).mkdir(parents=True)
    (to / name / "x.jsonl").write_text("".join(line + "\n" for line in lines))
    return to


def shards(to: Path, vocab_size: int, **meta: Any) -> Path:
    (to / "github").mkdir(parents=True)
    with ShardWriter(to / "github", vocab_size=vocab_size) as writer:
        for number in range(40):
            writer.add(Document([1, 2, 3, 4] * 8, None, number))
            writer.mark(1)
        writer.close(**meta)
    return to


def other(here: Path, to: Path, **sizes: Any) -> Path:
    """The split of another model."""
    split_ffn(dense_folder(to.with_suffix(".dense"), **sizes), "random", num_experts=8).save(to)
    return to


def written(to: Path, value: object) -> Path:
    to.write_text(json.dumps(value))
    return to


def uneven(here: Path, to: Path) -> Path:
    """A mixture with a linear router whose first expert took a neuron of the second."""
    split = Split.load(here / "split.safetensors")
    for number, layer in enumerate(split.indices):
        wide = torch.cat([layer, torch.full_like(layer[:, :1], -1)], 1)
        wide[0, -1], wide[1, 7] = layer[1, 7], -1
        split.indices[number] = wide
    convert(here / "dense", split, to, gate_network="linear")
    return to


def broken_router(here: Path, to: Path) -> Path:
    """A mixture whose second router holds a NaN."""
    to.mkdir()
    for file in (here / "mlp").iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    # not from the file that is written: its tensors are mapped
    tensors = load_file(here / "mlp" / "model.safetensors")
    tensors["model.layers.1.mlp.router.fc2.weight"][0, 0] = torch.nan
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def check(here: Path, data: object, *more: object) -> tuple[object, ...]:
    return ("data", "check", "--model", here / "mlp", "--data", data, "--max_length", 32, *more)


def exported(here: Path, name: str | Path, to: Path, format: str) -> tuple[object, ...]:
    return ("export", "--model", here / name, "--save_path", to / "out", "--format", format)


def resumed(here: Path, *more: object, **changes: Any) -> tuple[object, ...]:
    return ("train", *trained(here, steps=3, **changes), "-o", here / "run", "--resume", "auto", "--eval_every", "never", *more)


def started(here: Path, to: Path, *more: object, **changes: Any) -> tuple[object, ...]:
    return ("train", *trained(here, **changes), "-o", to / "run", *more)


Words = Callable[[Path, Path], tuple[object, ...]]
DYNAMIC = ("--dynamic_data_selection", "sheared_llama")

# by row of the specification: what is typed (h: the module's folder, t: an empty one), the exit code, and parts of the message
ROWS: dict[str, tuple[Words, int, tuple[str, ...]]] = {
    "more selects than experts": (
        lambda h, t: (*converted(h), "--num_selects", 9), 2, ("num_selects: 9 of 8 experts; use 1 to 8",)),
    "more selects than experts, in a run": (
        lambda h, t: started(h, t, "--num_selects", 9), 2, ("num_selects: 9 of 8 experts; use 1 to 8",)),
    "no selects": (
        lambda h, t: (*converted(h), "--num_selects", 0), 2, ("num_selects", "0", "at least 1")),
    "experts that do not divide": (
        lambda h, t: ("split", "random", "--model_path", h / "dense", "--num_experts", 7, "--save_path", t / "s"), 2,
        ("num_experts: 7 experts do not divide the 64 neurons of a layer; use for example",)),
    "experts that do not divide, in a run": (
        lambda h, t: started(h, t, "--from_dense", "random", "--num_experts", 7, model=h / "dense"), 2,
        ("num_experts: 7 experts do not divide", "64")),
    "split of other weights": (
        lambda h, t: (*converted(h), "--split_file_path", other(h, t / "s", seed=1)), 2,
        ("split_file_path:", "made for other weights of the same shape; split this model")),
    "split of other layers": (
        lambda h, t: (*converted(h), "--split_file_path", other(h, t / "s", num_hidden_layers=1)), 2,
        ("split_file_path:", "is for 1 layers of 64 neurons, the model has 2 of 64; split this model")),
    "split of another size": (
        lambda h, t: (*converted(h), "--split_file_path", other(h, t / "s", intermediate_size=128)), 2,
        ("split_file_path:", "is for 2 layers of 128 neurons, the model has 2 of 64; split this model")),
    "neuron missing": (
        lambda h, t: (*converted(h), "--split_file_path", split_of(h, t / "s", lambda layer: layer[0].fill_(-1))), 2,
        ("split_file_path:", "layer 1: neuron", "is missing; write the split again")),
    "neuron twice": (
        lambda h, t: (*converted(h), "--split_file_path", split_of(h, t / "s", lambda layer: layer[0].copy_(layer[1]))), 2,
        ("split_file_path:", "layer 1: neuron", "; write the split again")),
    "neuron out of range": (
        lambda h, t: (*converted(h), "--split_file_path", split_of(h, t / "s", lambda layer: layer[0, 0].fill_(64))), 2,
        ("split_file_path:", "layer 1: neuron 64 is outside 0 to 63")),
    "another activation": (
        lambda h, t: ("split", "random", "--model_path", changed_model(h, t / "m", hidden_act="gelu"), "--num_experts", 8, "--save_path", t / "s"),
        2, ("model_path:", "activation gelu", "unbiased SwiGLU", "name another model")),
    "biased layers": (
        lambda h, t: ("split", "random", "--model_path", changed_model(h, t / "m", mlp_bias=True), "--num_experts", 8, "--save_path", t / "s"),
        2, ("model_path:", "biases in its feed-forward layers", "name another model")),
    "another architecture": (
        lambda h, t: ("split", "random", "--model_path", changed_model(h, t / "m", model_type="gpt2"), "--num_experts", 8, "--save_path", t / "s"),
        2, ("model_path:", "is a gpt2 model", "name one of those")),
    "another architecture, converted": (
        lambda h, t: (*converted(h), "--model_path", changed_model(h, t / "m", model_type="gpt2")), 2, ("is a gpt2 model", "name one of those")),
    "source without a share": (
        lambda h, t: check(h, h / "data", "--prob_map", '{"github": 1}'), 2, ("prob_map: no share for source en_book", "add one")),
    "negative share": (
        lambda h, t: check(h, h / "data", "--prob_map", '{"github": -1, "en_book": 1}'), 2, ("prob_map: github has share -1", "at least 0")),
    "share that is no number": (
        lambda h, t: check(h, h / "data", "--prob_map", '{"github": NaN, "en_book": 1}'), 2, ("prob_map: github has share nan", "at least 0")),
    "shares of zero": (
        lambda h, t: check(h, h / "data", "--prob_map", '{"github": 0, "en_book": 0}'), 2, ("prob_map: all shares of", "are 0; give one")),
    "empty source": (
        lambda h, t: (sources(t / "d", "{}"), (t / "d" / "en_cc").mkdir(), check(h, t / "d"))[2], 2,
        ("dataset_dir: source", "en_cc is empty; add .jsonl files or shards")),
    "empty folder": (
        lambda h, t: ((t / "d").mkdir(), check(h, t / "d"))[1], 2, ("data:", ".jsonl")),
    "malformed line": (
        lambda h, t: check(h, sources(t / "d", '{"text": "a"}', '{"text": ')), 2, ("data:", "x.jsonl:2 is not valid JSON", "correct or remove")),
    "malformed line to tokenise": (
        lambda h, t: ("tokenize", "-i", sources(t / "d", '{"content": "a"}', "{"), "-o", t / "o", "-t", "bytes", "-f", "jsonl"), 2,
        ("x.jsonl:2 is not valid JSON", "correct or remove")),
    "id beyond the vocabulary": (
        lambda h, t: check(h, sources(t / "d", '{"input_ids": [1, 2, 300]}')), 2, ("input_ids: 300 is outside the vocabulary of 259", "tokenizer")),
    "id beyond the vocabulary to pack": (
        lambda h, t: ("pack", "-i", sources(t / "d", '{"input_ids": [1, 2, 300]}'), "-o", t / "o", "-t", "bytes"), 2,
        ("input_ids: 300 is outside the vocabulary of 259", "tokenizer")),
    "shards of another tokenizer": (
        lambda h, t: check(h, shards(t / "d", 259, tokenizer_sha256="0" * 64)), 2, ("data:", "meta.json names another tokenizer", "use the one")),
    "shards of another vocabulary": (
        lambda h, t: check(h, shards(t / "d", 1000)), 2, ("data:", "were made for 1000 ids, the tokenizer 259", "use the tokenizer")),
    "tokenizer beyond the vocabulary": (
        lambda h, t: started(h, t, "--from_dense", "random", "--num_experts", 8, model=changed_model(h, t / "m", vocab_size=200)), 2,
        ("tokenizer: 259 entries, but", "embeds 200", "name the tokenizer")),
    "shares that move without held-out data": (
        lambda h, t: started(h, t, *DYNAMIC, "--eval-data", h / "data" / "github", "--eval_every", 1), 2,
        ("eval_data: source en_book has no held-out data", "add some")),
    "shares that move without a reference": (
        lambda h, t: started(h, t, *DYNAMIC, "--eval_every", 1, "--reference_loss", written(t / "r.json", {"github": 1.0})), 2,
        ("reference_loss:", "r.json has no loss for source en_book; write one")),
    "shares that move without evaluation": (
        lambda h, t: started(h, t, *DYNAMIC, "--eval_every", "never"), 2, ("eval_every: never", "--dynamic-data-selection", "give an interval")),
    "samples beyond the positions": (
        lambda h, t: started(h, t, length=65), 2, ("max_length: 65 is beyond the 64 positions of", "use at most 64")),
    "less than one batch": (
        lambda h, t: ("train", "--model", h / "mlp", "--data", h / "data", "--max_length", 32, "--num_tokens", 255, "-o", t / "run"), 2,
        ("num_tokens: 255 is less than one batch of 256 tokens; give more",)),
    "mixtral with an mlp router": (
        lambda h, t: exported(h, "mlp", t, "mixtral"), 2, ("mixtral cannot hold this mixture", "its router is an mlp; use --format llama_moe")),
    "mixtral with shared experts": (
        lambda h, t: exported(h, "shared", t, "mixtral"), 2, ("mixtral has no shared experts; use --format granitemoeshared",)),
    "mixtral with uneven experts": (
        lambda h, t: exported(h, uneven(h, t / "m"), t, "mixtral"), 2, ("its experts differ in size; use --format llama_moe",)),
    "granitemoeshared with an mlp router": (
        lambda h, t: exported(h, "mlp", t, "granitemoeshared"), 2, ("its router is an mlp; use --format llama_moe",)),
    "resumed with other samples": (
        lambda h, t: resumed(h, length=16), 4, ("max_length: the checkpoint was written with 32", "16", "keep it", "or add --allow-data-change")),
    "resumed with another seed": (
        lambda h, t: resumed(h, "--seed", 5), 4, ("seed: the checkpoint was written with 1227", "5", "keep it", "or add --allow-data-change")),
    "resumed with other sources": (
        lambda h, t: resumed(h, data=sources(t / "d", *LINES)), 4, ("data:", "github", "keep it", "or add --allow-data-change")),
    "resumed with another batch": (
        lambda h, t: resumed(h, "--micro_batch_size", 4), 4, ("global batch: the checkpoint was written with 2", "has 4", "change --accumulate", "or add --allow-data-change")),
    "leave to change data where nothing is resumed": (
        lambda h, t: started(h, t, "--allow_data_change"), 2, ("allow_data_change: nothing is resumed; add --resume auto",)),
    "adapters of nothing": (
        lambda h, t: started(h, t, "--mode", "lora", "--trainable", "query"), 2, ("trainable: the model has no query; choose from",)),
    "adapters partly of nothing": (
        lambda h, t: started(h, t, "--mode", "lora", "--trainable", "q_proj,query,gate"), 2,
        ("trainable: the model has no query, gate; choose from",)),
    "factors of other layers": (
        lambda h, t: (*converted(h), "--score_scale_factor_file_path", written(t / "s.json", [1.0])), 2,
        ("score_scale_factor_file_path:", "holds 1 numbers for 2 layers; calibrate this model")),
    "router that is not finite": (
        lambda h, t: started(h, t, "--eval_every", "never", model=broken_router(h, t / "m")), 3,
        ("router: the logits of layer 1 are not finite in step 0; lower --lr",)),
    "occupied folder": (
        lambda h, t: ("train", *trained(h), "-o", h / "run"), 2, ("output_dir:", "already holds a run; add --resume auto, --overwrite")),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_refused_with_field_value_and_fix(row: str, here: Path, tmp_path: Path) -> None:
    words, code, parts = ROWS[row]
    message = call(*words(here, tmp_path), code=code)
    assert "Traceback" not in message
    for part in parts:
        assert part in message
    assert not (tmp_path / "out").exists()
    assert not (here / "never").exists()
