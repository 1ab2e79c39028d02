"""Weights and optimizer state as named tensors plus JSON: what checkpoints hold, and never a pickle."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lm_core.errors import InputError, ResumeRefused

FORMAT_VERSION = 1
# how an update is computed, not what it computes: these follow the machine that resumes
_IMPLEMENTATION = ("foreach", "fused", "capturable")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict by name, each once: a tied tensor appears under its first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"model: {name} in its state dict is a {type(value).__name__}; checkpoints hold tensors, so keep such state in the method"
            )
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file on disk for good (fsync); tensors may be strided or share memory."""
    storages: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous()
        # safetensors refuses two tensors in one storage
        address = flat.untyped_storage().data_ptr()
        ready[name] = flat.clone() if address in storages else flat
        if flat.numel():
            storages.add(address)
    save_file(ready, path, metadata={"format": "pt"})
    sync(path)


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor (on the CPU), one at a time. Raises ResumeRefused when the file cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is not iterable
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ResumeRefused(f"{path}: cannot be read ({error}); resume from another checkpoint") from error


def write_json(path: Path, value: Any) -> None:
    """A JSON file that appears whole or not at all, and stays (temporary file, fsync, rename, fsync of the folder)."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def require_room(folder: Path) -> None:
    """Raise OSError when `folder` cannot take another file: for libraries that do not tell why a write of theirs failed."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(2**20))


def sync(path: Path) -> None:
    """Flush a file or folder to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_weights(model: nn.Module, saved: Iterator[tuple[str, Tensor]], renamed: Mapping[str, str]) -> None:
    """Copy `saved` into the model; `renamed` maps names of the file to names of the module.

    Raises ResumeRefused naming the first tensor that is missing, unknown, or of another shape or dtype.
    """
    waiting = weights(model)
    for name, value in saved:
        name = renamed.get(name, name)
        _compare(name, waiting.get(name), value.shape, value.dtype)
        with torch.no_grad():
            waiting.pop(name).copy_(value)
    _complain_of(waiting)


def check_weights(now: Mapping[str, Tensor], saved: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Raise ResumeRefused naming the first tensor that is missing, unknown, or of another shape or dtype."""
    for name, (shape, dtype) in saved.items():
        _compare(name, now.get(name), shape, dtype)
    _complain_of([name for name in now if name not in saved])


def _compare(name: str, now: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> None:
    if now is None:
        raise ResumeRefused(f"model: the checkpoint holds {name}, which this model does not have; resume with the model it was written by")
    if now.shape != shape or now.dtype != dtype:
        raise ResumeRefused(
            f"model: {name} is {tuple(shape)} {dtype} in the checkpoint and {tuple(now.shape)} {now.dtype} in this model; "
            "resume with the model it was written by"
        )


def _complain_of(missing: Collection[str]) -> None:
    if missing:
        raise ResumeRefused(
            f"model: {next(iter(missing))} is not in the checkpoint ({len(missing)} missing); resume with the model it was written by"
        )


def _plain(value: Any, where: str) -> Any:
    """`value` if JSON can hold it (tuples become lists), else InputError naming it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    raise InputError(f"optimizer: {where} is a {type(value).__name__}; checkpoints hold tensors, numbers, strings and lists of them")


def _names(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> list[list[str]]:
    """Parameter names of each group, in the optimizer's order."""
    by_id = {id(parameter): name for name, parameter in names.items()}
    return [[by_id[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def describe(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Any]:
    """Class and group members of an optimizer: what must be the same where its state is restored."""
    return {
        "format_version": FORMAT_VERSION,
        "class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        "groups": [{"names": members} for members in _names(optimizer, names)],
    }


def check_optimizer(now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise ResumeRefused, by name, unless the description `saved` fits the description `now`."""
    if saved.get("format_version") != FORMAT_VERSION:
        raise ResumeRefused(
            f"optimizer: format {saved.get('format_version')} of the checkpoint is unknown here (this version reads {FORMAT_VERSION})"
        )
    if saved["class"] != now["class"]:
        raise ResumeRefused(
            f"optimizer: the checkpoint was written by {saved['class']}, this run uses {now['class']}; resume with the same optimizer"
        )
    for number, (group, then) in enumerate(zip(now["groups"], saved["groups"], strict=False)):
        different = sorted(set(group["names"]) ^ set(then["names"]))
        if different:
            raise ResumeRefused(
                f"optimizer: {different[0]} is in group {number} on one side only; resume with the same trained parameters and rules"
            )
    if len(saved["groups"]) != len(now["groups"]):
        raise ResumeRefused(
            f"optimizer: {len(saved['groups'])} groups in the checkpoint, {len(now['groups'])} in this run; resume with the same rules"
        )


def _split(values: Mapping[str, Any], path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What JSON can hold of `values`; its tensors, also those of mappings inside it, go to `tensors` by path."""
    scalars: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            tensors[f"{path}/{key}"] = value.detach()
        elif isinstance(value, dict):
            scalars[key] = _split(value, f"{path}/{key}", tensors)
        else:
            scalars[key] = _plain(value, f"{path}/{key}")
    return scalars


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of any torch optimizer as tensors keyed `{parameter name}/{state key}`, and the rest as JSON.

    `names` maps names to the optimizer's parameters (`dict(model.named_parameters())`). The state of a parameter may hold
    tensors of any dtype, numbers, strings, lists of them and mappings; anything else is an InputError naming it.
    """
    state_dict = optimizer.state_dict()
    info = describe(optimizer, names)
    name_of: dict[int, str] = {}
    for group, described in zip(state_dict["param_groups"], info["groups"], strict=True):
        name_of.update(zip(group["params"], described["names"], strict=True))
        settings = {key: value for key, value in group.items() if key not in ("params", "names", *_IMPLEMENTATION)}
        described["settings"] = _plain(settings, "a group")
    tensors: dict[str, Tensor] = {}
    scalars = {name_of[number]: _split(state, name_of[number], tensors) for number, state in state_dict["state"].items()}
    rest = {key: _plain(value, key) for key, value in state_dict.items() if key not in ("state", "param_groups")}
    return tensors, {**info, "state": scalars, "rest": rest}


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], tensors: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> None:
    """Restore what `optimizer_tensors` returned, every tensor in its own dtype. Raises ResumeRefused by name on a mismatch."""
    check_optimizer(describe(optimizer, names), saved)
    now = optimizer.state_dict()
    number_of = {
        name: number
        for group, group_names in zip(now["param_groups"], _names(optimizer, names), strict=True)
        for name, number in zip(group_names, group["params"], strict=True)
    }
    state: dict[int, dict[str, Any]] = {number_of[name]: copy.deepcopy(values) for name, values in saved["state"].items()}
    for path, tensor in tensors.items():
        name = next((path[:end] for end in _slashes(path) if path[:end] in number_of), None)
        if name is None:
            raise ResumeRefused(
                f"optimizer: the checkpoint has {path}, which this run does not train; resume with the same trained parameters"
            )
        *outer, field = path[len(name) + 1 :].split("/")
        values = state[number_of[name]]
        for key in outer:
            values = values[key]
        values[field] = tensor
    groups = []
    for group, group_names, then in zip(now["param_groups"], _names(optimizer, names), saved["groups"], strict=True):
        restored = {key: tuple(value) if isinstance(group.get(key), tuple) else value for key, value in then["settings"].items()}
        # the order of parameters inside a group is this run's; settings are the checkpoint's
        groups.append({**group, **restored, "params": [number_of[name] for name in group_names]})
    try:
        optimizer.load_state_dict({**saved["rest"], "state": {n: dict(values) for n, values in state.items()}, "param_groups": groups})
    except ValueError as error:
        raise ResumeRefused(f"optimizer: {error}") from error
    # torch casts state to the parameter's dtype, which destroys 8-bit codes and float32 moments of bfloat16 weights,
    # and turns a string into the text of a generator (torch 2.13)
    parameters = {number_of[name]: parameter for name, parameter in names.items() if name in number_of}
    for number, values in state.items():
        _restore(optimizer.state[parameters[number]], values)


def _restore(loaded: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            # an optimizer may save in a mapping what it keeps without one (bitsandbytes does)
            _restore(loaded.get(key, loaded), value)
        elif not isinstance(value, Tensor):
            loaded[key] = value
        elif loaded[key].dtype != value.dtype:
            loaded[key] = value.to(loaded[key].device)


def _slashes(path: str) -> list[int]:
    return [position for position, letter in enumerate(path) if letter == "/"]
