"""Hugging Face folders of trained models, and trained models of other sources."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lm_core.errors import ConfigError, RunFailed
from lm_core.models import load_tokenizer, quiet
from mdm_scaling.model import checkpoint_folder, load_network, objective_of, vocabulary_of, warm
from mdm_scaling.options import ExportConfig, ImportConfig


def export(config: ExportConfig) -> dict[str, Any]:
    """A LlamaForCausalLM folder for AR; for MDM the same tensors with the modelling code beside them."""
    return _write(load_network(config.checkpoint), config.checkpoint, config.out, config.overwrite)


def bring(config: ImportConfig, model: str) -> dict[str, Any]:
    """The weights of a Llama-shaped model under an objective, its embedding padded for the mask."""
    made = warm(
        config.objective, load_network(model), std=config.init_std, divisible_by=config.make_vocab_size_divisible_by, restrict_logits=True,
        seed=config.seed,
    )  # fmt: skip
    return _write(made, model, config.out, config.overwrite)


def _write(model: PreTrainedModel, name: str, out: Path, overwrite: bool) -> dict[str, Any]:
    """Write into a folder beside the target, compare, and move it there."""
    if out.exists() and not overwrite:
        raise ConfigError(f"out: {out} is there already; add --overwrite, or choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with quiet():
            model.save_pretrained(str(partial))
        load_tokenizer(checkpoint_folder(name)).save_pretrained(str(partial))
        read = load_network(str(partial))
        for tensor_name, tensor in model.state_dict().items():
            if not torch.equal(read.state_dict()[tensor_name], tensor):
                raise RunFailed(f"export: {tensor_name} differs after reading it back; nothing was written")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    result = {"out": str(out), "objective": objective_of(model), "vocabulary": vocabulary_of(model), "class": type(model).__name__}
    print(f"{out}: {result['class']}, vocabulary {result['vocabulary']}, mask {result['vocabulary']}")
    return result
