"""What reads the user's files: every function that opens a file and refuses what it holds, and how a fuzzer calls it with one file."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.repo.tree import packages

OPENING = {"open", "read_text", "read_bytes", "memmap", "fromfile", "load_file", "safe_open"}


def found() -> Iterator[str]:
    """Readers by module and function."""
    for package in packages():
        for path in package.sources:
            if "/hf/" in str(path):
                continue
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef):
                    calls = [call.func for call in ast.walk(function) if isinstance(call, ast.Call)]
                    called = {getattr(call, "attr", getattr(call, "id", "")) for call in calls}
                    if called & OPENING and called & {"InputError", "reading"}:
                        yield f"{package.module(path)}.{function.name}"


def classes() -> Iterator[type]:
    """Every class of options in the packages."""
    for package in packages():
        for path in package.sources:
            if "\n@config\n" in path.read_text():
                module = importlib.import_module(package.module(path))
                yield from (
                    cls
                    for cls in vars(module).values()
                    if "_own_types" in getattr(cls, "__dict__", {}) and cls.__module__ == module.__name__
                )


def beside(path: Path, name: str) -> Path:
    """A folder that holds the content of `path` under `name`."""
    folder = path.parent / "folder"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(path.read_bytes())
    return folder


def pair(path: Path) -> Path:
    """A prefix whose index is the content of `path`."""
    folder = beside(path, "x.idx")
    (folder / "x.bin").write_bytes(bytes(64))
    return folder / "x"


def of(module: str, name: str) -> Any:
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def plain(module: str, name: str, *more: Any) -> Callable[[Path], Any]:
    return lambda path: of(module, name)(path, *more)


FUZZED: dict[str, Callable[[Path], Any]] = {
    "beacon.eval.short._questions": lambda path: list(of("beacon.eval.short", "_questions")(SimpleNamespace(data_file=path))),
    "beacon.use._read": plain("beacon.use", "_read"),
    "beacon.use._tensors": lambda path: of("beacon.use", "_tensors")(beside(path, "x.safetensors")),
    "lm_core.data.shards._meta": lambda path: of("lm_core.data.shards", "_meta")(beside(path, "meta.json")),
    "mdm_scaling.data.indexed.open": lambda path: of("mdm_scaling.data.indexed", "Indexed.open")(pair(path)),
    "mdm_scaling.data.pathfile.read": plain("mdm_scaling.data.pathfile", "read"),
    "mdm_scaling.data.tools.verify": lambda path: of("mdm_scaling.data.tools", "verify")(str(pair(path)), None),
    "mdm_scaling.data.vocabulary.gpt2": lambda path: of("mdm_scaling.data.vocabulary", "gpt2")(path, path),
    "mdm_scaling.fit.laws.read_law": lambda path: of("mdm_scaling.fit.laws", "read_law")(str(path)),
    "mdm_scaling.fit.points.read_points": plain("mdm_scaling.fit.points", "read_points"),
    "mdm_scaling.sweep.read": plain("mdm_scaling.sweep", "read"),
    "mdm_scaling.tasks.read_items": plain("mdm_scaling.tasks", "read_items"),
    "moe_cpt.calibrate.read_scales": plain("moe_cpt.calibrate", "read_scales", 2),
    "moe_cpt.plan.seconds_per_step": lambda path: of("moe_cpt.plan", "seconds_per_step")(beside(path, "metrics.jsonl")),
    "moe_cpt.split.features.read_features": lambda path: of("moe_cpt.split.features", "read_features")(
        beside(path, "layer_0.safetensors"), 0, "act", 8
    ),
    "moe_cpt.split.gradient.read_scores": plain("moe_cpt.split.gradient", "read_scores", 0, "up_proj", 2, 8),
    "moe_cpt.split.load": plain("moe_cpt.split", "Split.load"),
    "moe_cpt.split.text_clusters.load": lambda path: of("moe_cpt.split.text_clusters", "load")(
        beside(path, "clusters.safetensors"), "sentence"
    ),
    "moe_cpt.train_gate.read_gate": plain("moe_cpt.train_gate", "read_gate", None, "mlp"),
    "rwkv_distill.binidx.read": lambda path: list(of("rwkv_distill.binidx", "read")(pair(path))),
    "rwkv_distill.continue_text.chat": plain("rwkv_distill.continue_text", "chat"),
    "rwkv_distill.state_file.load": plain(
        "rwkv_distill.state_file", "load", SimpleNamespace(config=SimpleNamespace(teacher={}, student={}), state_dict=dict)
    ),
}

# those that read what a command of ours wrote as a whole folder, or rows that another reader above has opened
ELSEWHERE = {
    "rows of lm_core.data.sources, which is fuzzed": ["beacon.data.encoded.encoded", "rwkv_distill.rows.open_rows"],
    "pairs of mdm_scaling.data.indexed, which is fuzzed": ["mdm_scaling.data.corpus._indexed", "mdm_scaling.data.tools.concat"],
    "text that is copied line by line": ["mdm_scaling.data.tools.subset", "moe_cpt.corpus.keep_between", "moe_cpt.commands.slurm.slurm_render"],
    "benchmarks' own files, by name": ["beacon.eval.files._rows"],
    "folders of models and runs, whose damage nox -s faults tries": [
        "beacon.io.load_adapter", "beacon.use._base_of", "beacon.use.import_folder", "beacon.use.inspect", "lowrank_opt.comparison.read",
        "lowrank_opt.inspection.run", "moe_cpt.report.compare", "moe_cpt.tensors.__init__", "rwkv_distill.arwkv.from_arwkv",
        "rwkv_distill.export._with_tokenizer", "rwkv_distill.student.load_student", "rwkv_distill.teacher_cache.__init__",
        "rwkv_distill.teacher_cache._open", "rwkv_distill.weights._stored", "rwkv_distill.weights.files",
    ],
}  # fmt: skip
