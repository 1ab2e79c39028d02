from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError
from mdm_scaling.data.indexed import Indexed
from mdm_scaling.data.tokenize import tokenize
from mdm_scaling.options import TokenizeConfig


def corpus(path: Path, texts: list[str]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def test_documents_become_sequences_with_an_end(tmp_path: Path) -> None:
    source = corpus(tmp_path / "a.jsonl.gz", ["ab", "", "ü"])
    result = tokenize(TokenizeConfig(input=str(source), output_prefix=tmp_path / "out", tokenizer="bytes"))
    end = byte_tokenizer().eos_token_id
    read = Indexed.open(tmp_path / "out_text_document")
    assert [read[n].tolist() for n in range(len(read))] == [[97, 98, end], [*"ü".encode(), end]]
    assert (read.dtype, read.documents.tolist()) == (np.dtype("<u2"), [0, 1, 2])
    assert (result["documents"], result["tokens"]) == (2, 6)


def test_the_end_may_be_left_out(tmp_path: Path) -> None:
    source = corpus(tmp_path / "a.jsonl.gz", ["ab", "c"])
    tokenize(TokenizeConfig(input=str(source), output_prefix=tmp_path / "out", tokenizer="bytes", append_eod=False))
    read = Indexed.open(tmp_path / "out_text_document")
    assert [read[n].tolist() for n in range(len(read))] == [[97, 98], [99]]


@pytest.mark.slow
def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    seen = set()
    for workers in (1, 2):
        # different inputs to the cache, equal texts
        source = corpus(tmp_path / f"{workers}.jsonl.gz", [f"text {number}" for number in range(300)])
        tokenize(TokenizeConfig(input=str(source), output_prefix=tmp_path / str(workers), tokenizer="bytes", workers=workers))
        seen.add(tuple(Path(f"{tmp_path / str(workers)}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx")))
    assert len(seen) == 1


def test_files_are_not_replaced_unasked_and_bad_lines_are_named(tmp_path: Path) -> None:
    source = corpus(tmp_path / "a.jsonl.gz", ["ab"])
    config = TokenizeConfig(input=str(source), output_prefix=tmp_path / "out", tokenizer="bytes")
    tokenize(config)
    with pytest.raises(ConfigError, match="is there already"):
        tokenize(config)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text"\n')
    with pytest.raises(InputError, match=r"b\.jsonl:2 is not valid JSON"):
        tokenize(TokenizeConfig(input=str(tmp_path / "b.jsonl"), output_prefix=tmp_path / "b", tokenizer="bytes"))
    assert not list(tmp_path.glob("b_text*"))


def test_bad_lines_are_left_out_and_counted_where_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [b'{"text": "ab"}', b'{"text"', b"[1]", b"", b'{"other": "x"}', b'{"text": 3}', b'{"text": "\xff"}', b'{"text": "c"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "good.jsonl").write_bytes(lines[0] + b"\n" + lines[-1])
    for name in ("a", "good"):
        config = TokenizeConfig(
            input=str(tmp_path / f"{name}.jsonl"), output_prefix=tmp_path / name, tokenizer="bytes", skip_bad_lines=name == "a"
        )
        result = tokenize(config)
        assert (result["documents"], result["bad_lines"]) == (2, 5 if name == "a" else 0)
    assert "2 documents, 5 tokens of 16 bits, 5 bad lines left out" in capsys.readouterr().out
    assert (tmp_path / "a_text_document.bin").read_bytes() == (tmp_path / "good_text_document.bin").read_bytes()
    with pytest.raises(ConfigError, match="skip_bad_lines: synthetic:markov has no lines of JSON"):
        tokenize(TokenizeConfig(input="synthetic:markov", output_prefix=tmp_path / "s", tokenizer="bytes", skip_bad_lines=True))
