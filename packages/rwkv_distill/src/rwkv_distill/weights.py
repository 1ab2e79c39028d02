"""Weights of a student from whatever holds them: a file, an exported folder, a checkpoint, or a run folder."""

from __future__ import annotations

import json
import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lm_core import checkpoint
from lm_core.engine.state import read_tensors, weights, write_tensors
from lm_core.errors import InputError
from rwkv_distill.adapters import summed
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
    """Names and tensors at `path`, adapters added to their weights. Raises InputError where there are none, or where a file holds more than tensors."""
    parts = _gathered(path) if path.is_dir() else None
    yield from summed(_stored(path) if parts is None else parts)


def _stored(path: Path) -> Iterator[tuple[str, Tensor]]:
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


def consolidate(path: Path, output: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, frozen ones too, as one file; what and how much was written."""
    tensors = {name: tensor.clone() for name, tensor in read(path)}
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".bin":
        torch.save(tensors, output)
    else:
        write_tensors(output, tensors)
    return {"output": str(output), "tensors": len(tensors), "bytes": output.stat().st_size}


def _gathered(path: Path) -> Iterator[tuple[str, Tensor]] | None:
    """The tensors of a checkpoint that an engine wrote in parts, whole, by the student's names; None where there is no such one."""
    folder = (checkpoint.latest(path) if (path / "checkpoints").is_dir() else None) or path
    if (folder / "model" / ".metadata").is_file():
        return _own(_of_shards(folder / "model"))
    if (folder / "deepspeed").is_dir():
        return _own(_of_zero(folder))
    return None


def _own(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix("student."), tensor) for name, tensor in tensors.items())


def _of_shards(folder: Path) -> dict[str, Tensor]:
    """FSDP2's, read by one process."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        # it says that there is one process
        warnings.simplefilter("ignore", UserWarning)
        load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensors


def _of_zero(folder: Path) -> dict[str, Tensor]:
    """DeepSpeed's float32 masters, and what is not trained."""
    from contextlib import redirect_stdout
    from io import StringIO

    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(StringIO()):
        trained: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder / "deepspeed"), tag="zero")
    rest = folder / "untrained.safetensors"
    return {**dict(read_tensors(rest) if rest.is_file() else ()), **trained}


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
