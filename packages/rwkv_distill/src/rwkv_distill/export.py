"""Students in the layouts of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lm_core import checkpoint
from lm_core.errors import ConfigError, InputError
from lm_core.models import load_tokenizer, quiet
from rwkv_distill.arwkv import copy_tokenizer, from_arwkv, to_arwkv, to_pth
from rwkv_distill.command_config import ExportConfig, ImportConfig
from rwkv_distill.student import StudentModel, load_student

__all__ = ["export", "import_student", "to_arwkv", "to_hf", "to_pth"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(config: ExportConfig) -> dict[str, Any]:
    """Write what `config` names; the result says where and how much."""
    refuse_occupied(config.output_dir)
    folder = student_folder(config.ckpt)
    student = load_student(folder)
    dtype = DTYPES[config.dtype]
    if config.format == "hf":
        written = to_hf(student, config.output_dir, dtype, shard_size=config.shard_size)
    else:
        written = (to_arwkv if config.format == "arwkv" else to_pth)(student, config.output_dir, dtype)
    load_tokenizer(str(_with_tokenizer(folder))).save_pretrained(config.output_dir)
    return {"output_dir": str(written), "bytes": sum(file.stat().st_size for file in written.iterdir())}


def import_student(path: Path, config: ImportConfig) -> dict[str, Any]:
    """An exported folder as a float32 student folder."""
    refuse_occupied(config.output_dir)
    student = from_arwkv(path) if config.format == "arwkv" else load_student(path)
    to_hf(student, config.output_dir, torch.float32)
    copy_tokenizer(path, config.output_dir)
    return {"output_dir": str(config.output_dir)}


def refuse_occupied(folder: Path) -> None:
    """Raise ConfigError for a folder that holds anything."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"output_dir: {folder} already holds files; name a new folder")


def to_hf(model: StudentModel, folder: str | Path, dtype: torch.dtype = torch.float32, *, shard_size: str = "5GB") -> Path:
    """`model` as a Hugging Face folder with its modelling code, so that it loads with `trust_remote_code` where this package is not."""
    names = model.state_dict()
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in names.items()}
    # tied tensors share their memory, so that they are written once
    shared: dict[int, torch.Tensor] = {}
    for name, tensor in names.items():
        state[name] = shared.setdefault(tensor.data_ptr(), state[name])
    model.config.dtype = dtype
    with quiet():
        model.save_pretrained(folder, state_dict=state, max_shard_size=shard_size, pytorch_bin=False)
    return Path(folder)


def student_folder(path: Path) -> Path:
    """The folder with the student that `path` means: itself, or the `final/` or newest checkpoint of a run."""
    for folder in (path, path / "final", checkpoint.latest(path) if (path / "checkpoints").is_dir() else None):
        if folder is not None and (folder / "config.json").is_file():
            return folder
    raise InputError(f"ckpt: {path} holds no student; name a run folder, its final/ folder or one of its checkpoints")


def _with_tokenizer(folder: Path) -> Path | str:
    """`folder`, or for a checkpoint what its run read its tokenizer from."""
    if (folder / "tokenizer_config.json").is_file():
        return folder
    options = json.loads((folder / "state.json").read_text())["config"] if (folder / "state.json").is_file() else {}
    if not options:
        raise InputError(f"ckpt: {folder} has no tokenizer; name a final/ folder or a checkpoint")
    final = folder.parent.parent / "final"
    return final if (final / "tokenizer_config.json").is_file() else str(options["tokenizer"] or options["model"])
