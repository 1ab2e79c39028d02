"""docs/benchmarks.md: our training beside what a user would pick otherwise, and every package's `bench`, each beside its target.

Written by `nox -s bench`, one part after the other; `python -m tests.repo.benchmarks docs/benchmarks.json docs/benchmarks.md galore "moe-cpt bench"`
measures two parts, keeps the others, and draws the page.

End to end, every run is a program of its own on one thread. A stopwatch outside reads its processor time whenever it logs a step, so
that other work on the machine disturbs little, and the peak of its memory at the end. The first step warms up.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lm_core.sinks import read
from tests.repo.tree import ROOT, methods

STEPS = 5
QUIET = ["--eval-every", "never", "--save-every", "never", "--log-every", "1", "--schedule", "constant", "--warmup", "0", "--lr", "1e-4"]


@dataclass(frozen=True)
class Race:
    """Commands that train on the same rows: the first is ours."""

    what: str
    data: str
    length: int
    batch: int
    ours: list[str]
    peers: dict[str, list[str]]
    tokenizer: str = "bytes"

    def commands(self, folder: Path) -> Iterator[tuple[str, list[str], Path]]:
        """Name, command and run folder of every participant."""
        shared = ["--data", self.data, "--tokenizer", self.tokenizer]
        ours = [
            *shared,
            "--packing",
            "stream",
            "--max-length",
            str(self.length),
            "--micro-batch-size",
            str(self.batch),
            "--precision",
            "fp32",
        ]
        yield "ours", [*self.ours, *ours, *QUIET, "--budget", f"{STEPS} steps", "--output-dir", str(folder / "ours")], folder / "ours"
        for name, words in self.peers.items():
            place = folder / name.replace(" ", "-")
            if words[0] != "peer":
                yield name, [*words, *ours, *QUIET, "--budget", f"{STEPS} steps", "--output-dir", str(place)], place
                continue
            theirs = [*shared, "--length", str(self.length), "--batch", str(self.batch), "--steps", str(STEPS), "--output", str(place)]
            yield name, [sys.executable, "-m", "tests.repo.peers", *words[1:], *theirs], place


def races(folder: Path) -> dict[str, Race]:
    """Every comparison by its name; random models that ours take as folders are written to `folder`."""

    def dense(shape: str, vocabulary: int) -> str:
        from tests.repo.peers import dense as make

        if not (folder / shape).exists():
            make(shape, vocabulary).save_pretrained(folder / shape)
        return str(folder / shape)

    small, real = "smollm2-135m", ["--mode", "finetuning", "--param-dtype", "fp32"]
    lowrank = ["lowrank-opt", "train", "--model", small, *real, "--optimizer"]
    where = {"data": "builtin:python-docs", "length": 128, "batch": 2, "tokenizer": small}
    made: dict[str, Callable[[], Race]] = {
        "adamw": lambda: Race(
            "AdamW, SmolLM2-135M", **where, ours=[*lowrank, "baseline"], peers={"transformers.Trainer": ["peer", "trainer", "--model", small]},
        ),
        "galore": lambda: Race(
            "GaLore, SmolLM2-135M, rank 128", **where, ours=[*lowrank, "galore", "--rank", "128", "--update-proj-gap", "200"],
            peers={"galore-torch": ["peer", "galore-torch", "--model", small]},
        ),
        "apollo": lambda: Race(
            "APOLLO, SmolLM2-135M, rank 128", **where, ours=[*lowrank, "apollo", "--apollo-rank", "128"],
            peers={"apollo-torch": ["peer", "apollo-torch", "--model", small]},
        ),
        "moe_cpt": lambda: Race(
            "mixture of 8 experts, 2 at work, width 512, 4 layers", "synthetic:markov", 256, 4,
            ["moe-cpt", "train", "--model", dense("dense", 259), "--from-dense", "random", "--num-experts", "8", "--num-selects", "2"],
            {"stock Mixtral in transformers.Trainer": ["peer", "trainer", "--model", "mixtral", "--vocabulary", "259"]},
        ),
        "mdm_scaling": lambda: Race(
            "masked diffusion, width 512, 4 layers, vocabulary 49152", "builtin:python-docs", 128, 8,
            ["mdm-scaling", "pretrain", "--objective", "mdm", "--num-layers", "4", "--hidden-size", "512", "--num-attention-heads", "8",
             "--kv-channels", "64", "--ffn-hidden-size", "2048", "--global-batch-size", "8", "--attention-dropout", "0", "--hidden-dropout", "0"],
            {"a script with transformers' Llama": ["peer", "masked", "--model", "dense"]}, tokenizer=small,
        ),
        "beacon": lambda: Race(
            "contexts of 4096 tokens, windows of 512 condensed by 8, all weights trained, width 256, 4 layers", "builtin:python-docs", 4096, 1,
            ["beacon", "train", "--model", dense("long", 259), "--beacon-window", "512", "--beacon-stride", "512", "--beacon-ratio", "8",
             "--no-only-train-beacon"],
            {"full attention in transformers.Trainer": ["peer", "trainer", "--model", "long", "--vocabulary", "259"]},
        ),
        "rwkv_distill": lambda: Race(
            "RWKV-7 student of a Llama, width 256, 4 layers, stage 2", "synthetic:markov", 256, 2,
            ["rwkv-distill", "train", "--model", dense("long", 259), "--stage", "2", "--head-size", "64"],
            {"the recurrence in PyTorch, step by step": ["rwkv-distill", "train", "--model", dense("long", 259), "--stage", "2", "--head-size", "64",
             "--kernels", "reference"]},
        ),
    }  # fmt: skip
    return {name: make() for name, make in made.items()}


@dataclass(frozen=True)
class Run:
    """What one program took: processor and wall seconds of a step (median behind the first) and of the first, its peak, its losses."""

    name: str
    seconds: float
    wall: float
    first: float
    peak: int
    losses: list[float]


def watched(name: str, command: list[str], folder: Path) -> Run:
    """Run `command` and note its processor time whenever it logs a step."""
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
    stat, ticks = Path(f"/proc/{child.pid}/stat"), os.sysconf("SC_CLK_TCK")
    marks: list[tuple[float, float]] = []
    usage: Any = None
    while usage is None:
        lines = [row for row in read(folder / "metrics.jsonl") if "train/loss" in row]
        if len(lines) > len(marks):
            fields = stat.read_text().rpartition(") ")[2].split()
            marks += [((int(fields[11]) + int(fields[12])) / ticks, time.monotonic())] * (len(lines) - len(marks))
        done, status, found = os.wait4(child.pid, os.WNOHANG)
        if done:
            usage = found
            child.returncode = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    if child.returncode or len(marks) != STEPS:
        raise SystemExit(
            f"{' '.join(command)}\nended with {child.returncode} after {len(marks)} of {STEPS} steps\n{log.read_text()[-3000:]}"
        )
    steps = [(later[0] - earlier[0], later[1] - earlier[1]) for earlier, later in pairwise(marks)]
    losses = [row["train/loss"] for row in read(folder / "metrics.jsonl") if "train/loss" in row]
    processor, wall = (statistics.median(step[at] for step in steps) for at in (0, 1))
    return Run(name, processor, wall, marks[0][0], usage.ru_maxrss * 1024, losses)


def raced(race: Race) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        runs = [watched(*participant) for participant in race.commands(Path(folder))]
        progress = json.loads((Path(folder) / "ours/result.json").read_text())["progress"]
    return {
        "what": race.what, "rows": f"{race.batch} x {race.length}", "tokens": race.batch * race.length,
        "floor": progress["flops"] / progress["steps"] / rate(), "runs": [asdict(run) for run in runs],
    }  # fmt: skip


def benched(script: str, arguments: list[str]) -> dict[str, Any]:
    """A package's `bench`, as figures."""
    words = [script, "bench", *arguments, "--json"]
    printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if printed.returncode:
        raise SystemExit(f"{' '.join(words)}\nended with {printed.returncode}\n{printed.stderr[-3000:]}")
    return {"command": " ".join(words[:-1]), "figures": json.loads(printed.stdout)["figures"]}


def conditions(seconds: float, load: float) -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    processor = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    return {
        "date": str(datetime.date.today()), "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", ".", ":!docs/benchmarks.*") else ""),
        "machine": f"{processor or platform.machine()}, {os.cpu_count()} cores", "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "seconds": round(seconds),
    }  # fmt: skip


HEAD = """\
# Benchmarks

Written by `nox -s bench` from [benchmarks.json](benchmarks.json). Each part has its own date and commit (with a + if files were changed).

## Training beside what else there is

The same rows, model shape, precision (float32) and number of steps in programs of their own, one thread each. `tokens/s` are tokens per second of
processor time in the median step behind the first one; the ratio is ours over theirs. `first step` is the processor time until it was logged,
with imports, loading, and for low-rank optimizers the first projection. `peak` is the most memory that the whole program held.
`floor` is the time that the operations of our step (as `lm_core.estimate` counts them) take at the rate of a large float32 product on one
thread, over the time of our step; it is above 1 for masked diffusion, whose head we compute for masked tokens alone, while the estimate
counts all, and may be elsewhere where the processor's clock changed between the two. Load: before and after, over all programs on the machine.
In the tables of figures, `floor` is the figure that would come out if our side took no time for anything but the products and bytes that it
cannot do without, at the rates of the same run: a target beyond it is out of this machine's reach.
"""


def page(parts: dict[str, Any]) -> str:
    lines = [
        HEAD,
        "| | program | tokens/s | ratio | floor / step | first step | peak GiB | loss of step 1, last | date, commit, load |",
        "|---" * 9 + "|",
    ]
    for part in (part for part in parts.values() if "runs" in part):
        ours, *_ = part["runs"]
        where = part["conditions"]
        for run in part["runs"]:
            mine = run is ours
            lines.append(
                f"| {part['what'] + ', ' + part['rows'] + ' tokens' if mine else ''} | {run['name']} | {part['tokens'] / run['seconds']:.0f} | "
                f"{'' if mine else format(run['seconds'] / ours['seconds'], '.2f')} | {format(part['floor'] / ours['seconds'], '.2f') if mine else ''} | "
                f"{run['first']:.1f} s | {run['peak'] / 2**30:.2f} | {run['losses'][0]:.3f}, {run['losses'][-1]:.3f} | "
                f"{where['date'] + ', ' + where['commit'] + ', ' + ' to '.join(map(str, where['load'])) if mine else ''} |"
            )
    for name, part in parts.items():
        if "figures" in part:
            where = part["conditions"]
            load = " to ".join(map(str, where["load"]))
            told = f"`{part['command']}`, {where['date']}, commit {where['commit']}, load {load}, {where['seconds']} s."
            lines += [
                "",
                f"## {name.removesuffix(' bench')}",
                "",
                told,
                "",
                "| figure | value | target | floor | met |",
                "|---|---|---|---|---|",
            ]
            for figure in part["figures"]:
                target = figure["target"]
                bound = "" if target is None else f"{'≥' if figure['least'] else '≤'} {target:g}"
                met = "" if target is None else ("yes" if figure["pass"] else "**no**")
                floor = "" if figure.get("floor") is None else f"{figure['floor']:.4g}"
                lines.append(f"| {figure['name']}: {figure['what']} | {figure['value']:.4g} | {bound} | {floor} | {met} |")
    machines = sorted({part["conditions"]["machine"] for part in parts.values()})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}.", ""])


def rate() -> float:
    """Operations per processor second of a large float32 product on one thread."""
    import torch

    torch.set_num_threads(1)
    one, other = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(9):
        began = time.process_time()
        one @ other
        seconds.append(time.process_time() - began)
    return 2 * 1024**3 / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("parts", nargs="*", help="Parts to measure now; default: all of them.")
    parser.add_argument("--draw", action="store_true", help="Measure nothing, draw the page again.")
    options = parser.parse_args()
    parts = json.loads(options.results.read_text()) if options.results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        known = races(Path(folder))
        benches = {f"{script} bench": (script, []) for package in methods() for script in package.project.get("scripts", {})}
        for name in [] if options.draw else options.parts or [*known, *benches]:
            # `lowrank-opt bench --only C3` measures some of the figures
            words = name.split()
            load, began = os.getloadavg()[0], time.monotonic()
            part = raced(known[name]) if name in known else benched(words[0], words[2:])
            parts[" ".join(words[:2])] = {"conditions": conditions(time.monotonic() - began, load)} | part
            options.results.write_text(json.dumps(parts, indent=1) + "\n")
    options.page.write_text(page(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
