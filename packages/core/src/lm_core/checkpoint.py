"""Checkpoints that are whole or not there, and a resume that refuses by name what would not be the same run.

    <run>/checkpoints/checkpoint-<step>/    what the engine writes, and state.json, written last by rename

`state.json` holds progress, data and method state, the options, and size and CRC-32 of every other file. A folder without
it is an interrupted save, which the next save removes. All functions are called by every rank, with a folder that all of
them can reach.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lm_core import dist
from lm_core.config import to_dict
from lm_core.engine.state import sync, write_json
from lm_core.errors import ResumeRefused
from lm_core.options import EngineOptions, OutputOptions
from lm_core.progress import Progress

if TYPE_CHECKING:
    from lm_core.engine.base import Engine
    from lm_core.method import Method
    from lm_core.options import RunConfig

FORMAT_VERSION = 1
log = logging.getLogger(__name__)

# Options that may differ between a checkpoint and the run that resumes it: neither samples nor model depend on them.
# The global batch (micro_batch_size x accumulate x processes) is compared as a whole.
_FREE = (
    {field.name for field in fields(OutputOptions)} - {"seed"}
    | {field.name for field in fields(EngineOptions)} - {"precision"}
    | {"eval_data", "num_workers", "gradient_checkpointing", "dry_run"}
)
# What the loader compares, by the names that `allow` has for it.
_OF_DATA = {"seed": "seed", "global_batch_size": "global_batch", "data": "sources", "weights": "weights"}
# These change the rest of the run, never what has been done: allowed, and said.
_SCHEDULE = {"lr", "schedule", "warmup", "cooldown", "min_lr_ratio"}


class DataState(Protocol):
    """The part of a loader that a checkpoint needs: integers and weights, the same on every rank, and what says which samples follow."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], allow: Collection[str] = ()) -> None: ...


def save(
    run_folder: Path,
    *,
    engine: Engine,
    method: Method,
    data: DataState,
    progress: Progress,
    keep: int,
    keep_optimizer: int,
    extra: Mapping[str, Any] | None = None,
    write: Callable[[Path], Any] | None = None,
    beside: Callable[[Path], Any] | None = None,
) -> Path:
    """Write `checkpoint-<steps>`, then remove what is no longer kept; the folder of the new checkpoint.

    Killed at any moment, it leaves the checkpoints of before or the new one. `keep` newest checkpoints stay (0: all), of them
    the `keep_optimizer` newest (0: all) with optimizer state. `extra` is JSON-able state of the caller, kept under that name. With
    `write` a checkpoint holds what that writes instead of the engine's state, and no run can resume from it. `beside` adds files, on
    the first process.
    """
    folder = run_folder / "checkpoints" / f"checkpoint-{progress.steps}"
    try:
        dist.on_main(_make_room, folder)
        engine.save(folder) if write is None else write(folder)
        if beside is not None:
            dist.on_main(beside, folder)
        state = {
            "format_version": FORMAT_VERSION,
            "progress": progress.to_dict(),
            "engine": {"kind": engine.kind, "world": engine.data_world},
            "optimizer": write is None,
            "config": to_dict(method.config),
            "data": data.state_dict(),
            "method": method.state_dict(),
            "extra": dict(extra or {}),
            "files": _record(folder),
        }
        dist.on_main(_complete, folder, state)
    except Exception:
        # on a full disk, what there is of it only takes room
        if dist.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    dist.on_main(_prune, folder, keep, keep_optimizer, engine.optimizer_files)
    return folder


def _make_room(folder: Path) -> None:
    """An empty `folder`. A complete checkpoint of the same step steps aside, still readable, until the new one is complete."""
    aside = folder.with_name(folder.name + ".old")
    if (folder / "state.json").exists():
        if aside.exists():
            _remove(aside)
        folder.rename(aside)
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _record(folder: Path) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of every file under `folder`, flushed to the device; the ranks share the work."""
    dist.barrier()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    mine = {}
    for path in paths[dist.rank() :: dist.world()]:
        sync(path)
        mine[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    return {name: entry for part in dist.gather_objects(mine) for name, entry in sorted(part.items())}


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _complete(folder: Path, state: dict[str, Any]) -> None:
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent]:
        sync(path)
    _write(folder, state)


def _write(folder: Path, state: Mapping[str, Any]) -> None:
    """state.json, which completes the checkpoint, with a checksum of its own."""
    state = json.loads(json.dumps(state))  # as it will be read
    write_json(folder / "state.json", {**state, "crc32": _own_crc32(state)})


def _own_crc32(state: Mapping[str, Any]) -> int:
    """Of everything but the checksum itself."""
    return zlib.crc32(json.dumps({name: value for name, value in state.items() if name != "crc32"}, sort_keys=True).encode())


def _found(run_folder: Path) -> list[tuple[int, Path]]:
    """Every checkpoint folder with its step, newest first, complete or not; one that stepped aside comes after its successor."""
    found = []
    for path in (run_folder / "checkpoints").glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)(\.old)?", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _prune(newest: Path, keep: int, keep_optimizer: int, optimizer_files: Collection[str]) -> None:
    step_of_newest = int(newest.name.rpartition("-")[2])
    kept = 1
    for step, path in _found(newest.parent.parent):
        if path == newest:
            continue
        complete = (path / "state.json").exists()
        if complete and step > step_of_newest:
            log.warning("%s removed: the run went back to step %d or before and took another way", path, step_of_newest)
        if not complete or step >= step_of_newest or 0 < keep <= kept:
            _remove(path)
            continue
        kept += 1
        if 0 < keep_optimizer < kept:
            _strip(path, optimizer_files)


def _remove(folder: Path) -> None:
    """Incomplete first, then gone, so that a kill in between leaves nothing that looks whole."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _strip(folder: Path, patterns: Collection[str]) -> None:
    """Remove optimizer state; state.json stops listing it before it goes."""
    state = _read(folder)
    gone = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if not gone:
        return
    left = {name: entry for name, entry in state["files"].items() if name not in gone}
    _write(folder, {**state, "optimizer": False, "files": left})
    for name in gone:
        (folder / name).unlink()


def latest(run_folder: Path) -> Path | None:
    """The newest complete and undamaged checkpoint of a run that can be resumed, or None when the run has none yet.

    Warns about each one that it passes over. Raises ResumeRefused when there are complete ones but all are damaged.
    One process may ask alone.
    """
    refusals = []
    for _, path in _found(run_folder):
        if not (path / "state.json").exists():
            log.warning("%s: an interrupted save, passed over", path)
            continue
        try:
            verified(path)
        except ResumeRefused as refusal:
            log.warning("%s; passed over", refusal)
            refusals.append(refusal)
        else:
            return path
    if refusals:
        raise ResumeRefused(f"resume: no checkpoint in {run_folder} can be used ({refusals[0]}); start again with --overwrite")
    return None


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    if not path.exists():
        known = sorted(found.name for _, found in _found(folder)) if (folder / "checkpoints").is_dir() else []
        hint = (
            f"name one of {', '.join(known)} under {folder / 'checkpoints'}, or use --resume auto"
            if known
            else "name a complete checkpoint folder"
        )
        raise ResumeRefused(f"resume: {folder} is not a complete checkpoint (it has no state.json); {hint}")
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        version = state["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeRefused(f"resume: {path} is damaged ({error!r}); resume from another checkpoint") from error
    if version != FORMAT_VERSION:
        raise ResumeRefused(
            f"resume: {path} has format {version}, this version reads {FORMAT_VERSION}; resume with the version that wrote it"
        )
    if state.get("crc32") != _own_crc32(state):
        raise ResumeRefused(f"resume: {path} is damaged (its checksum differs); resume from another checkpoint")
    return state


def verified(folder: Path) -> dict[str, Any]:
    """The content of state.json, once every file it lists has been found whole. Raises ResumeRefused naming what is wrong."""
    state = _read(folder)
    if not state["optimizer"]:
        raise ResumeRefused(
            f"resume: {folder} holds no optimizer state (--keep-optimizer, --save-only-model); resume from another checkpoint"
        )
    # `latest` and then `resume` look at the same folder: its files are read once
    _verify(folder, (folder / "state.json").stat().st_mtime_ns)
    return state


@lru_cache
def _verify(folder: Path, written: int) -> None:
    for name, entry in _read(folder)["files"].items():
        path = folder / name
        if not path.exists():
            raise ResumeRefused(f"resume: {path} is missing; resume from another checkpoint")
        if path.stat().st_size != entry["bytes"]:
            raise ResumeRefused(
                f"resume: {path} has {path.stat().st_size} bytes instead of {entry['bytes']}; resume from another checkpoint"
            )
        if _crc32(path) != entry["crc32"]:
            raise ResumeRefused(f"resume: {path} is damaged (its checksum differs); resume from another checkpoint")


def resume(path: Path, *, engine: Engine, method: Method, data: DataState, config: RunConfig, allow: Collection[str] = ()) -> Progress:
    """Restore engine, method and data from the checkpoint folder `path`; the progress it was written at.

    Raises ResumeRefused, naming the field, when the checkpoint is incomplete or damaged, was written by another kind of
    engine, or when an option differs that decides samples, model or optimizer. `allow` names options that a method
    lets differ as well, among them `global_batch_size`, `data`, which stands for the content of the data and its order, and `weights`,
    the shares of the sources: those of the options then hold, not those of the checkpoint (`Loader.load_state_dict` says what follows).
    """
    state = dist.on_main(verified, path)
    _compare(state, engine, config, allow)
    if method.fresh_optimizer:
        engine.load_weights(path)
    else:
        engine.load(path)
    data.load_state_dict(state["data"], {field for name, field in _OF_DATA.items() if name in allow})
    method.load_state_dict(state["method"])
    return Progress.from_dict(state["progress"])


def _compare(state: Mapping[str, Any], engine: Engine, config: RunConfig, allow: Collection[str]) -> None:
    then, now = dict(_flat(state["config"])), dict(_flat(json.loads(json.dumps(to_dict(config)))))
    for name in [name for name in then if name in now and name not in _FREE]:
        if then[name] == now[name]:
            continue
        if name in allow:
            log.info("%s: %r from here on; the checkpoint was written with %r", name, now[name], then[name])
            continue
        if name not in _SCHEDULE:
            raise ResumeRefused(
                f"{name}: the checkpoint was written with {then[name]!r}, this run asks for {now[name]!r}; keep it, or start a new run"
            )
        if dist.rank() == 0:
            log.warning("%s: %r from here on; the checkpoint was written with %r", name, now[name], then[name])
    saved = state["engine"]
    if saved["kind"] != engine.kind:
        raise ResumeRefused(
            f"engine: the checkpoint was written by the {saved['kind']} engine, this run uses {engine.kind}; use --engine {saved['kind']}"
        )
    batch_then = then["micro_batch_size"] * then["accumulate"] * saved["world"]
    batch_now = config.micro_batch_size * config.accumulate * engine.data_world
    if batch_then != batch_now and "global_batch_size" not in allow:
        raise ResumeRefused(
            f"global batch: the checkpoint was written with {batch_then} samples per step, this run has {batch_now} "
            f"({config.micro_batch_size} x {config.accumulate} on {engine.data_world} processes); change --accumulate or --micro-batch-size"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
