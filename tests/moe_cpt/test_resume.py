"""Runs that are killed and go on: the same samples and shares, or others where --allow-data-change says so."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lm_core.config import build
from lm_core.data.loader import Loader
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ResumeRefused
from lm_core.method import Batch, Loss
from lm_core.run import run
from lm_core.testing import spawn
from moe_cpt.config import TrainConfig
from moe_cpt.data import weighted_sources
from moe_cpt.method import MoeCPT
from tests.moe_cpt.small import mixture_folder

# by step and sample number: the source and the tokens
Seen = dict[int, dict[int, tuple[str, tuple[int, ...]]]]


class Killed(BaseException):
    """Nothing in a run catches it."""


class Recorded(MoeCPT):
    """Remembers what it reads, and dies in the middle of a step."""

    dies_in: int | None = None

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self.seen: Seen = defaultdict(dict)

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        yield from super().losses(model, batch)
        if model.training:
            rows = zip(batch.index.tolist(), batch["source"].tolist(), batch["input_ids"].tolist())
            self.seen[batch.step] |= {sample: (self._sources[source], tuple(ids)) for sample, source, ids in rows}
        if batch.step == self.dies_in:
            raise Killed


def attempt(options: dict[str, Any], dies_in: int | None = None) -> Seen:
    """What a run reads until its end or its death."""
    method = Recorded(build(TrainConfig, options))
    method.dies_in = dies_in
    try:
        run(method.config, method)
    except Killed:
        assert dies_in is not None
    return dict(method.seen)


def logged(folder: Path, name: str) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


@pytest.mark.slow
def test_a_run_killed_at_random_steps_reads_what_it_would_have_read_while_the_shares_move(tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_text('{"markov": 0.5, "copy": 3.5}')
    options: dict[str, Any] = {
        "model": "llama_test", "from_dense": "random", "num_experts": 8, "num_selects": 2, "tokenizer": "bytes", "max_length": 32,
        "data": ["synthetic:markov,synthetic:copy"], "dynamic_data_selection": "sheared_llama", "reference_loss": tmp_path / "reference.json",
        "balance_scope": "global", "warmup": 0, "lr": 5e-3, "precision": "fp32", "micro_batch_size": 4, "max_steps": 10, "eval_every": "2",
        "save_every": "3", "held_out_tokens": 128, "log_every": 1, "tensorboard": False, "resume": "auto",
    }  # fmt: skip
    whole, twice, fewer = (options | {"output_dir": tmp_path / name} for name in ("whole", "twice", "fewer"))
    expected = attempt(whole)
    shares = logged(tmp_path / "whole", "data/weight/markov")
    assert len({*shares}) == 5
    draw = random.Random(11)
    first = draw.randrange(3, 9)
    second = draw.randrange(first // 3 * 3, 10)

    found = attempt(twice, first) | attempt(twice, second) | attempt(twice)
    assert found == expected
    assert logged(tmp_path / "twice", "data/weight/markov") == shares
    assert logged(tmp_path / "twice", "train/loss") == logged(tmp_path / "whole", "train/loss")
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "twice")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    # two processes with half the batch each, then one
    parts = spawn(attempt, fewer | {"micro_batch_size": 2}, first)
    together = {step: parts[0][step] | parts[1][step] for step in parts[0]}
    assert together | attempt(fewer) == expected
    assert logged(tmp_path / "fewer", "data/weight/markov") == pytest.approx(shares, rel=1e-4)


def test_every_token_but_the_tail_is_read_once_per_pass_while_the_shares_move(tmp_path: Path) -> None:
    block, tokens = 8192, {"a": 20_000, "b": 18_000}
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(sum(tokens.values()))])
    first = 259
    for name, count in tokens.items():
        (tmp_path / name).mkdir()
        ids, draw, lines = list(range(first, first + count)), random.Random(name), []
        while ids:
            length = draw.randrange(1, 60)
            lines.append(json.dumps({"input_ids": ids[:length]}) + "\n")
            ids = ids[length:]
        (tmp_path / name / "x.jsonl").write_text("".join(lines))
        first += count
    options = {
        "model": "x",
        "data": [str(tmp_path)],
        "prob_map": '{"a": 1, "b": 3}',
        "max_length": block,
        "hold_out": 0.0,
        "eval_every": "never",
    }
    loader = Loader(weighted_sources(build(TrainConfig, options), tokenizer), micro_batch=1, seed=7)
    passes: dict[str, list[list[int]]] = {name: [] for name in tokens}
    for step in range(40):
        (batch,) = next(loader)
        name, here = loader.names[int(batch["source"][0])], batch["input_ids"][0].tolist()
        count = tokens[name] // block
        if sum(map(len, passes[name])) % (count * block) == 0:
            passes[name].append([])
        passes[name][-1] += here
        if step % 5 == 4:
            loader.set_weights({"a": step + 1, "b": 20})
    for name, count in tokens.items():
        complete = [read for read in passes[name] if len(read) == count // block * block]
        assert len(complete) >= 4
        for read in complete:
            assert max(Counter(read).values()) == 1
            assert 0 <= count - len(read) < block
        # another order each time
        assert len({tuple(read) for read in complete}) == len(complete)


TEXTS = {"github": "return", "en_book": "It was dark", "en_wiki": "The town"}
LOSSES = {"github": 4.0, "en_book": 3.0, "en_wiki": 2.0}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Seen]:
    """Four steps on two sources whose shares moved once, and what they read."""
    root = tmp_path_factory.mktemp("started")
    for name, text in TEXTS.items():
        (root / "all" / name).mkdir(parents=True)
        # no piece of 32 letters occurs twice
        lines = "".join(json.dumps({"text": " ".join(f"{text}{number}-{part}" for part in range(9))}) + "\n" for number in range(40))
        (root / "all" / name / "x.jsonl").write_text(lines)
    for folder, names in (("two", ("en_book", "github")), ("other", ("en_wiki", "github"))):
        for name in names:
            shutil.copytree(root / "all" / name, root / folder / name)
    (root / "reference.json").write_text(json.dumps(LOSSES))
    options: dict[str, Any] = {
        "model": str(mixture_folder(root)), "data": [str(root / "two")], "prob_map": '{"github": 1, "en_book": 1, "en_wiki": 2}', "max_length": 32,
        "dynamic_data_selection": "sheared_llama", "reference_loss": root / "reference.json", "micro_batch_size": 4, "max_steps": 8, "warmup": 0,
        "precision": "fp32", "eval_every": "3", "save_every": "2", "held_out_tokens": 64, "log_every": 1, "tensorboard": False,
        "output_dir": root / "run",
    }  # fmt: skip
    # the end of a run, with its pictures, takes longest
    return options, attempt(options, dies_in=4)


@pytest.fixture(scope="module")
def usual(started: tuple[dict[str, Any], Seen], tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, dict[str, Any]]:
    """What the next two steps read without any change."""
    return resumed(started, tmp_path_factory.mktemp("usual") / "run")


def resumed(started: tuple[dict[str, Any], Seen], folder: Path, **changes: Any) -> tuple[Seen, dict[str, Any]]:
    """What the two steps after the resume read, and the data's state behind them."""
    options = started[0]
    shutil.copytree(options["output_dir"], folder)
    changed = {**options, "output_dir": folder, "resume": "auto", "eval_every": "100", **changes}
    seen = attempt(changed, dies_in=6)
    return {step: seen[step] for step in (4, 5)}, json.loads((folder / "checkpoints" / "checkpoint-6" / "state.json").read_text())["data"]


def test_leave_that_is_not_used_changes_nothing(
    started: tuple[dict[str, Any], Seen], usual: tuple[Seen, dict[str, Any]], tmp_path: Path
) -> None:
    assert resumed(started, tmp_path / "run", allow_data_change=True) == usual


def test_another_list_of_sources_needs_leave_and_keeps_places_and_shares_by_name(
    started: tuple[dict[str, Any], Seen], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = started[0]["output_dir"].parent
    with pytest.raises(ResumeRefused, match=r"^data: the checkpoint was written with \['.*two'\], this run asks for \['.*other'\]"):
        resumed(started, tmp_path / "refused", data=[str(root / "other")])
    # the same folder with another source in it
    grown = tmp_path / "two"
    shutil.copytree(root / "all", grown)
    before = json.loads((root / "run" / "checkpoints" / "checkpoint-4" / "state.json").read_text())["data"]
    for data in (root / "other", grown):
        seen, after = resumed(started, tmp_path / f"run-{data.name}", data=[str(data)], allow_data_change=True)
        assert "data: sources ['en_" in caplog.text
        names = [name for name, *_ in after["sources"]]
        held = dict(zip(["en_book", "github"], before["mix"]["anchor"]["weights"]))
        assert held["github"] not in (0.5, held["en_book"])
        # beside the shares that moved, the half that the prob map gives the new one among those at hand
        fresh = {"other": 2 / 3, "two": 1 / 2}[data.name]
        whole = fresh + sum(held.get(name, 0.0) for name in names)
        assert after["mix"]["anchor"]["weights"] == pytest.approx([held.get(name, fresh) / whole for name in names])
        taken, drawn = (
            dict(zip(["en_book", "github"], before["mix"]["taken"])),
            Counter(name for rows in seen.values() for name, _ in rows.values()),
        )
        assert after["mix"]["taken"] == [taken.get(name, 0) + drawn[name] for name in names]
        assert after["mix"]["sample"] == 24
        # nothing of a source that stays is read again
        old = {row for step, rows in started[1].items() if step < 4 for row in rows.values()}
        assert not old & {row for rows in seen.values() for row in rows.values()}
        shutil.rmtree(tmp_path / f"run-{data.name}")


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"max_length": 16}, "max_length: the checkpoint was written with 32, this run asks for 16"),
        ({"seed": 5}, "seed: the checkpoint was written with 1227, this run asks for 5"),
        ({"micro_batch_size": 2}, "global batch: the checkpoint was written with 4 samples per step, this run has 2"),
        ({"prob_map": "{'github': 3, 'en_book': 1}"}, "prob_map: the checkpoint was written with"),
    ],
)
def test_other_samples_need_leave(
    changes: dict[str, Any], refusal: str, started: tuple[dict[str, Any], Seen], usual: tuple[Seen, dict[str, Any]], tmp_path: Path
) -> None:
    changes = {name: value.replace("'", '"') if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(ResumeRefused, match=refusal):
        resumed(started, tmp_path / "refused", **changes)
    seen, after = resumed(started, tmp_path / "run", allow_data_change=True, **changes)
    numbers = [number for rows in seen.values() for number in sorted(rows)]
    assert numbers == list(range(16, 16 + 2 * changes.get("micro_batch_size", 4)))
    assert after["mix"]["sample"] == numbers[-1] + 1
    if "micro_batch_size" in changes:
        assert {**seen[4], **seen[5]} == usual[0][4]
    elif "prob_map" in changes:
        # the shares follow the losses
        assert seen == usual[0]
    else:
        assert seen != usual[0]
        assert {len(ids) for rows in seen.values() for _, ids in rows.values()} == {changes.get("max_length", 32)}


def test_shares_that_do_not_move_are_those_given(started: tuple[dict[str, Any], Seen], tmp_path: Path) -> None:
    fixed = {name: value for name, value in started[0].items() if name not in ("dynamic_data_selection", "reference_loss")}
    fixed |= {"output_dir": tmp_path / "run"}
    attempt(fixed, dies_in=4)
    _, after = resumed((fixed, {}), tmp_path / "other", prob_map='{"github": 3, "en_book": 1}', allow_data_change=True)
    assert after["mix"]["anchor"]["weights"] == [0.25, 0.75]
    assert after["mix"]["anchor"]["sample"] == 16
