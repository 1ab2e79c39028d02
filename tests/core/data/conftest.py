from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lm_core.data.shards import Document, ShardWriter, Source


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LM_CORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def options() -> Callable[..., Any]:
    """DataOptions with the defaults of the commands, without building a configuration."""

    def make(**values: Any) -> Any:
        defaults: dict[str, Any] = {
            "data": [], "eval_data": [], "text_column": "text", "hold_out": 0.05, "max_length": 16, "packing": "stream",
            "shuffle": True, "seed": 0, "tokenizer": "bytes", "model": "none",
        }  # fmt: skip
        return SimpleNamespace(**(defaults | values))

    return make


@pytest.fixture(scope="session")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Source]:
    """A source whose documents have these lengths; token t of the whole source is t, so every token can be recognised."""

    def make(lengths: Sequence[int], labels: bool = False, shard_tokens: int = 1 << 20) -> Source:
        folder = tmp_path_factory.mktemp("shards")
        with ShardWriter(folder, vocab_size=1 << 20, labels=labels, shard_tokens=shard_tokens) as writer:
            start = 0
            for number, length in enumerate(lengths):
                ids = np.arange(start, start + length)
                writer.add(Document(ids, np.where(ids % 2, ids, -100) if labels else None, number * 2**55))
                writer.mark(1)
                start += length
            writer.close()
        return Source.open(folder)

    return make
