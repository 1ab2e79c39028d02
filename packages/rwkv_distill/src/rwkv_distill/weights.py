"""Weights of a student from whatever holds them: a file, an exported folder, a checkpoint, or a run folder."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from lm_core import checkpoint
from lm_core.engine.state import weights
from lm_core.errors import InputError
from rwkv_distill.student import StudentModel, untie

log = logging.getLogger(__name__)


def load_into(student: StudentModel, path: str | Path, *, fresh_mixers: bool = False) -> None:
    """Copy the tensors at `path` into the student; what they lack keeps its value.

    Raises InputError for files that cannot be read, another shape, and missing tensors of mixers unless `fresh_mixers`.
    """
    waiting = weights(student)
    expected, loaded, unexpected = len(waiting), 0, []
    head: Tensor | None = None
    for name, tensor in read(Path(path)):
        if name == "lm_head.weight" and name not in waiting:
            # a tied student, and maybe the file of one whose head was trained
            head = tensor
            continue
        mine = waiting.pop(name, None)
        if mine is None:
            unexpected.append(name)
            continue
        if mine.shape != tensor.shape:
            raise InputError(
                f"ckpt_file: {name} is {tuple(tensor.shape)} in {path} and {tuple(mine.shape)} in this student; "
                "give the student options that the file was made with"
            )
        with torch.no_grad():
            mine.copy_(tensor)
        loaded += 1
    if head is not None and not torch.equal(head, student.model.embed_tokens.weight.detach()):
        untie(student)
        with torch.no_grad():
            student.lm_head.weight.copy_(head)
    absent = [name for name in waiting if "time_mixer" in name]
    if absent and not fresh_mixers:
        raise InputError(
            f"ckpt_file: {path} lacks {len(absent)} tensors of mixers, first {absent[0]}; give the student options that it was made with, "
            "or --init to start them afresh"
        )
    log.info("ckpt_file: %d of %d tensors loaded, %d missing, %d unexpected", loaded, expected, len(waiting), len(unexpected))
    if unexpected:
        log.warning("ckpt_file: %s holds tensors this student has no place for, first %s", path, unexpected[0])


def read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors at `path`. Raises InputError where there are none, or where a file holds more than tensors."""
    for file in files(path):
        try:
            if file.suffix == ".safetensors":
                from safetensors import safe_open

                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - the handle is not iterable
                        yield name, opened.get_tensor(name)
                continue
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"ckpt_file: {file} cannot be read as tensors ({reason}); give .safetensors, or a .bin of tensors") from error
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise InputError(f"ckpt_file: {file} is no mapping of names to tensors; give the weights of a student")
        yield from content.items()


def files(path: Path) -> list[Path]:
    """The files with weights at `path`: a file, a sharded or plain folder, the `final/` or the newest checkpoint of a run."""
    if path.is_file():
        return [path]
    for folder in (path, path / "final", checkpoint.latest(path) if (path / "checkpoints").is_dir() else None):
        if folder is None:
            continue
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (folder / name).is_file():
                return [folder / name]
            if (index := folder / f"{name}.index.json").is_file():
                return [folder / part for part in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise InputError(f"ckpt_file: {path} holds no weights; give a .bin or .safetensors file, a checkpoint, a final/ folder or a run folder")
