"""A cached folder is complete or absent, and made once."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from lm_core import cache
from lm_core.errors import ConfigError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_CORE_CACHE", str(tmp_path))


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    calls = []

    def write(folder: Path) -> None:
        calls.append(folder)
        (folder / "thing").write_text("made")

    assert cache.build("kind", "key", write) == cache.build("kind", "key", write) == tmp_path / "kind" / "key"
    assert (tmp_path / "kind" / "key" / "thing").read_text() == "made"
    assert len(calls) == 1


def test_another_folder_holds_what_is_made_within(tmp_path: Path) -> None:
    with cache.kept_in(tmp_path / "elsewhere"), cache.kept_in(None):
        path = cache.build("kind", "key", lambda folder: None)
    assert path == tmp_path / "elsewhere" / "kind" / "key"
    assert path.is_dir()
    assert cache.root() == tmp_path


def test_a_failed_build_leaves_no_folder_and_starts_empty_again() -> None:
    def fail(folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "half").touch()
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cache.build("kind", "key", fail)
    assert not cache.folder("kind", "key").exists()


def test_a_resumed_build_finds_what_was_left() -> None:
    def grow(folder: Path) -> None:
        (folder / str(len(list(folder.iterdir())))).touch()
        if len(list(folder.iterdir())) < 3:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cache.build("kind", "key", grow, resume=True)
    assert sorted(path.name for path in cache.build("kind", "key", grow, resume=True).iterdir()) == ["0", "1", "2"]


def _count(folder: Path) -> None:
    with open(folder.parent / "calls", "a") as calls:
        calls.write(f"{os.getpid()}\n")


def _ask(barrier) -> None:
    barrier.wait()
    cache.build("kind", "key", _count)


def test_processes_that_ask_at_once_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_ask, args=(barrier,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len((tmp_path / "kind" / "calls").read_text().split()) == 1


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LM_CORE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="LM_CORE_CACHE"):
        cache.build("kind", "key", lambda folder: None)
