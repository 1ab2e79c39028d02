"""Recall: the rows that ask for it, and that gradients through memory teach it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from beacon.cli import cli
from lm_core.data.vocab import byte_tokenizer

WORDS = byte_tokenizer()


def written(folder: Path, *options: str) -> list[dict[str, Any]]:
    import datasets

    arguments = ["recall-data", "--model", "llama_tiny", "--tokenizer", "bytes", "--length", "600", "--num-rows", "12"]
    done = CliRunner().invoke(cli, [*arguments, "--output-dir", str(folder), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return list(datasets.load_from_disk(str(folder)))


def test_answers_of_recall_rows_were_told_in_the_first_half(tmp_path: Path) -> None:
    rows = written(tmp_path / "one")
    assert rows == written(tmp_path / "two")
    assert rows != written(tmp_path / "three", "--seed", "1")
    assert (tmp_path / "one" / "state.json").read_text() == (tmp_path / "two" / "state.json").read_text()
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        assert row["length"] == len(ids) == len(labels) in (599, 600)
        marks = "".join("x" if label != -100 else "." for label in labels)
        learned = [ids[match.start() : match.end()] for match in re.finditer("x+", marks)]
        assert learned
        assert all(label in (-100, token) for token, label in zip(ids, labels))
        # what is learned was said before, and long before
        told = WORDS.decode(ids[: 600 // 2 + 150])
        assert all(WORDS.decode(part, skip_special_tokens=True).strip() in told for part in learned)
    assert "Again:" in WORDS.decode(rows[2]["input_ids"])


def test_rows_too_short_for_their_questions_are_refused(tmp_path: Path) -> None:
    arguments = ["recall-data", "--model", "llama_tiny", "--tokenizer", "bytes", "--length", "100", "--output-dir", str(tmp_path / "rows")]
    done = CliRunner().invoke(cli, arguments)
    assert "length: 100 tokens do not hold the questions; use at least" in done.output
    assert not (tmp_path / "rows").exists()
