"""Hub data sets read while training, with datasets' own streaming code on a local file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lm_core.config import build
from lm_core.data.loader import Loader
from lm_core.errors import ConfigError
from lm_core.run import make_loader, run
from lowrank_opt.config import TrainConfig
from lowrank_opt.method import LowRank

DOCUMENTS, BUFFER = 50, 8


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A data set owner/texts whose rows come from a file; the list counts how often it was opened."""
    import datasets

    path, real, opened = tmp_path / "texts.jsonl", datasets.load_dataset, list[int]()
    path.write_text("".join(json.dumps({"text": f"number {n:03} " + "ab" * (n % 7)}) + "\n" for n in range(DOCUMENTS)))

    def load(name: str, config: str | None, split: str, streaming: bool) -> Any:
        assert (name, config, split, streaming) == ("owner/texts", None, "train", True)
        opened.append(1)
        return real("json", data_files=str(path), split="train", streaming=True)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    return opened


def options(folder: Path, **values: Any) -> TrainConfig:
    return build(TrainConfig, {
        "mode": "pretraining", "optimizer": "galore", "model": "llama_test", "tokenizer": "bytes", "data": ["owner/texts[40]"],
        "streaming": True, "shuffle_buffer": BUFFER, "max_length": 64, "micro_batch_size": 2, "precision": "fp32", "schedule": "constant",
        "output_dir": str(folder), "eval_every": "never", "tensorboard": False, "galore": {"rank": 8}, "num_workers": 0, "max_steps": 4, **values,
    })  # fmt: skip


def numbers(config: TrainConfig, steps: int, begun: int = 0, rank: int = 0, world: int = 1) -> list[int]:
    """The documents that a loader gives, by the number in their text; one that goes on where another was left after `begun` steps."""

    def made() -> Loader:
        method = LowRank(config)
        return make_loader(config, method.data(method.tokenizer()), rank, world)

    earlier, loader = made(), made()
    for _ in range(begun):
        next(earlier)
    loader.load_state_dict(earlier.state_dict())
    found = []
    for _ in range(steps):
        for batch in next(loader):
            texts = (bytes(int(one) for one in row if 32 <= one < 127).decode() for row in batch["input_ids"])
            found += [int(text.split()[1]) for text in texts]
    return found


def test_a_stream_gives_every_document_once_shuffled_in_blocks(hub: list[int], tmp_path: Path) -> None:
    config = options(tmp_path)
    first = numbers(config, 20)
    assert sorted(first) == list(range(40))
    assert first != sorted(first)
    for start in range(0, 40, BUFFER):
        assert sorted(first[start : start + BUFFER]) == list(range(start, start + BUFFER))
    assert len(hub) == 1
    # the next pass has another order, and goes over the same documents
    second = numbers(config, 40)[40:]
    assert sorted(second) == list(range(40))
    assert second != first
    assert numbers(options(tmp_path, shuffle=False, shuffle_buffer=10_000), 20) == list(range(40))
    # two processes have disjoint halves of each batch, and a run goes on at any step with what would have come
    halves = [numbers(config, 10, rank=rank, world=2) for rank in (0, 1)]
    assert sorted(halves[0] + halves[1]) == list(range(40))
    assert numbers(config, 13, begun=7) == first[14:]


def test_a_stream_that_ends_early_is_read_again_and_says_so(hub: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lowrank_opt"):
        found = numbers(options(tmp_path, data=["owner/texts[70]"]), 35)
    assert sorted(found[:50]) == list(range(50))
    # from the first three blocks again
    assert len(set(found[50:])) == 20
    assert max(found[50:]) < 3 * BUFFER
    assert "the stream ended after 50 documents, and 70 were foreseen" in caplog.text


def test_a_resumed_run_goes_on_exactly(hub: list[int], tmp_path: Path) -> None:
    whole = options(tmp_path / "whole", save_every="2")
    run(whole, LowRank(whole))
    for steps in (2, 4):
        config = options(tmp_path / "parts", max_steps=steps, resume="auto")
        run(config, LowRank(config))
    first, second = (load_file(tmp_path / name / "checkpoints/checkpoint-4/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_only_hub_data_sets_are_streamed(tmp_path: Path) -> None:
    method = LowRank(options(tmp_path, data=["synthetic:markov"]))
    with pytest.raises(ConfigError, match="streaming: synthetic:markov is no hub data set"):
        method.data(method.tokenizer())
