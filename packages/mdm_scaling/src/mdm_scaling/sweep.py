"""Grids of runs as files of resolved configurations, and their execution. Free of torch until a run begins."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import MISSING
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

from lm_core.cache import key_of
from lm_core.config import build, leaves, load, to_dict
from lm_core.errors import ConfigError, InputError, Interrupted, UserError
from mdm_scaling import planner, sizes
from mdm_scaling.config import LENGTHS, SHARED, PretrainConfig
from mdm_scaling.fit.points import write_table

logger = logging.getLogger(__name__)

Kind = Literal["isoflop", "data-value", "experiment", "lr"]
EPOCHS = (1, 2, 4, 10, 20, 50, 100)
PEAKS = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
# what the experiments vary, by objective
KNOBS: dict[str, list[dict[str, Any]]] = {
    "mdm": [
        *({"ar_ratio": ratio} for ratio in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)),
        *({"attention_dropout": p} for p in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)),
    ],
    "ar": [
        *({"attention_dropout": p} for p in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)),
        *(
            {"randmask_mode": mode, "randmask_ratio": ratio}
            for mode in ("attention", "column", "input")
            for ratio in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
        ),
        *(
            {"num_order_list": count, "use_predefined_order": how, "order_target_position": told}
            for told in ("none", "embedding")
            for how in (False, True)
            for count in (1, 2, 4, 8, 16)
        ),
    ],
}
# options that say where a run is written or how it is watched, not what it is
_ELSEWHERE = (
    "output_dir",
    "data_cache_dir",
    "resume",
    "overwrite",
    "wandb",
    "wandb_project",
    "tensorboard",
    "dry_run",
    "num_processes",
    *SHARED,
    "accumulate",
    "keep_best",
    "micro_batch_size",
    "eval_tokens",
    "override_resume",
    "skip_train",
    "recipe",
)


@lru_cache
def _defaults() -> dict[str, Any]:
    return {leaf.path: leaf.default for leaf in leaves(PretrainConfig) if leaf.default is not MISSING}


def run_id(config: PretrainConfig) -> str:
    """A short name of what decides the outcome of a run; defaults are left out, so that a new option renames no finished run."""
    return key_of({name: value for name, value in to_dict(config).items() if name not in _ELSEWHERE and value != _defaults().get(name)})[
        :12
    ]


def grid(
    kind: Kind, base: Mapping[str, Any], *, flops: Sequence[float] = (), epochs: Sequence[float] = EPOCHS, presets: Sequence[str] = (),
    seeds: Sequence[int] = (1234,), objectives: Sequence[str] = ("ar", "mdm"), sweep_hidden: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Runs {id, config} in a fixed order. Whatever the kind does not vary comes from `base`."""
    plain = {name.replace("-", "_"): value for name, value in base.items()}
    plain = {name: value for name, value in plain.items() if name not in (*LENGTHS, "unique_tokens", "output_dir", "objective", "seed")}
    models = list(presets) or [plain.pop("model", "")]
    plain.pop("model", None)
    if kind != "lr" and not flops:
        raise ConfigError(f"flops: a sweep of kind {kind} is made at given budgets; add --flops, for example --flops 1e13,3e13")
    entries = []
    for objective, seed, model in product(objectives, seeds, models):
        common = {**plain, "objective": objective, "seed": seed, "model": model}
        for changes in _changes(kind, common, flops, epochs):
            hidden = {"hidden_dropout": changes["attention_dropout"]} if sweep_hidden and "attention_dropout" in changes else {}
            entries.append(_entry({**common, **changes, **hidden}))
    return entries


def _changes(kind: Kind, common: Mapping[str, Any], flops: Sequence[float], epochs: Sequence[float]) -> Iterable[dict[str, Any]]:
    if kind == "experiment":
        return ({"flops": budget, **knob} for budget in flops for knob in KNOBS[common["objective"]])
    if kind == "isoflop":
        return ({"flops": budget} for budget in flops)
    if kind == "lr":
        budget = flops[0] if flops else None
        if budget is None:
            raise ConfigError("flops: a sweep of kind lr needs one budget; add --flops")
        return ({"flops": budget, "lr": peak, "min_lr": peak / 10} for peak in PEAKS)
    count = sizes.named(common["model"]).nominal if common["model"] in sizes.ALL else planner.count_of(common["model"])
    return ({"unique_tokens": int(planner.tokens_for(budget, count) // e), "epochs": e} for budget, e in product(flops, epochs))


def _entry(values: Mapping[str, Any]) -> dict[str, Any]:
    config = build(PretrainConfig, values)
    return {"id": run_id(config), "config": to_dict(config)}


def write(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """One run per line; runs that two grids share once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    once = {entry["id"]: entry for entry in entries}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in once.values()))


def read(path: Path) -> list[dict[str, Any]]:
    """The runs of a manifest. Raises InputError naming the line that is none."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"manifest: {path} cannot be read ({error}); write it with `mdm-scaling plan sweep`") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entries.append({"id": str(entry["id"]), "config": dict(entry["config"])})
        except (ValueError, KeyError, TypeError):
            raise InputError(f"manifest: {path}:{number} is no run with id and config; write it with `mdm-scaling plan sweep`") from None
    return entries


def base_of(path: Path | None) -> dict[str, Any]:
    """The options of a YAML file."""
    return {} if path is None else load(path)


# --- running ---


def status(folder: Path) -> str:
    """How a run ended; "" while it has not."""
    try:
        return str(json.loads((folder / "result.json").read_text()).get("status", ""))
    except (OSError, ValueError):
        return ""


def start(
    entries: Sequence[Mapping[str, Any]], folder: Path, *, jobs: int = 1, retry: Literal["all", "preempted"] = "all"
) -> dict[str, str]:
    """Run what is not done yet, `jobs` at a time, each in `folder`/<id>; how each ended. An interrupted run goes on where it stopped.

    With `retry` preempted, runs that ended in another way than done are left as they are.
    """
    states = {entry["id"]: status(folder / entry["id"]) for entry in entries}
    ended = ("done",) if retry == "all" else ("done", "failed", "killed")
    waiting = [entry for entry in entries if states[entry["id"]] not in ended]
    print(f"{len(entries) - len(waiting)} of {len(entries)} runs are done", flush=True)
    began = time.monotonic()
    if jobs == 1:
        for number, entry in enumerate(waiting, 1):
            states[entry["id"]] = _execute(dict(entry), folder)
            _tell(entry, states[entry["id"]], number, len(waiting), began)
            if states[entry["id"]] == "preempted":
                # whoever stopped this run did not ask for the next one
                raise Interrupted(f"runs: {folder / entry['id']} was stopped and saved; the same command goes on")
        return states
    with ThreadPoolExecutor(jobs) as pool:
        workers = queue.SimpleQueue[_Worker]()
        for _ in range(jobs):
            workers.put(_Worker(folder))

        def one(entry: Mapping[str, Any]) -> str:
            worker = workers.get()
            try:
                return worker.run(entry)
            finally:
                workers.put(worker)

        futures = {pool.submit(one, entry): entry for entry in waiting}
        for number, future in enumerate(as_completed(futures), 1):
            entry = futures[future]
            states[entry["id"]] = future.result()
            _tell(entry, states[entry["id"]], number, len(waiting), began)
        for _ in range(jobs):
            workers.get().close()
    return states


class _Worker:
    """A process that makes one run after the other, so that libraries are loaded once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def run(self, entry: Mapping[str, Any]) -> str:
        if self.process is None or self.process.poll() is not None:
            environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            command = [sys.executable, "-m", "mdm_scaling.sweep", str(self.folder)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(entry) + "\n")
        self.process.stdin.flush()
        # an empty line: the process has died
        return self.process.stdout.readline().strip() or "failed"

    def close(self) -> None:
        if self.process is not None:
            # closes both pipes and waits
            self.process.communicate()


def _serve(folder: Path) -> None:
    """What a worker does: a run per line of input, its state as a line of output."""
    answers = sys.stdout
    for line in sys.stdin:
        print(_execute(json.loads(line), folder), file=answers, flush=True)


def _tell(entry: Mapping[str, Any], state: str, number: int, total: int, began: float) -> None:
    config = entry["config"]
    spent = time.monotonic() - began
    left = spent / number * (total - number)
    print(
        f"{number}/{total}  {entry['id']}  {config['objective']} {config['model']}  {state}  {spent:.0f} s, about {left:.0f} s left",
        flush=True,
    )


def _execute(entry: dict[str, Any], folder: Path) -> str:
    """One run, its output in log.txt beside its result."""
    from dataclasses import replace

    from mdm_scaling.config import settled

    own = folder / entry["id"]
    own.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with (own / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            from mdm_scaling.train import pretrain

            options = replace(build(PretrainConfig, entry["config"]), output_dir=own, resume="auto")
            return str(pretrain(settled(options)).get("status", "failed"))
        except UserError as error:
            print(f"error: {error}", flush=True)
            logger.warning("%s: %s", entry["id"], error)
            return status(own) or "failed"


def collect(folders: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """The finished runs below these folders as rows, written to a table."""
    rows = []
    for folder in folders:
        for path in sorted(folder.rglob("result.json")):
            row = _row(path)
            if row is None:
                logger.warning("%s is not of a finished run; left out", path)
                continue
            rows.append(row)
    if not rows:
        raise InputError(f"runs: no finished run below {', '.join(map(str, folders))}; name the folder that holds them")
    write_table(out, rows)
    return rows


def _row(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text())
    except ValueError:
        return None
    scaling = result.get("scaling")
    if not scaling or result.get("status") != "done" or scaling.get("best_loss") is None:
        return None
    knobs = {name: value for name, value in scaling.get("knobs", {}).items() if value}
    return {
        **scaling,
        "run_id": result["id"],
        "experiment": " ".join(knobs),
        "knob": " ".join(f"{value}" for value in knobs.values()),
        "U": scaling["U"] or scaling["D"],
        "folder": str(path.parent),
    }


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
