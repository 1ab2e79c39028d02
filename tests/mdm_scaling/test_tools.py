from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from lm_core.errors import ConfigError, InputError
from mdm_scaling.data.indexed import Indexed, Writer, index_bytes
from mdm_scaling.data.tools import concat, inspect, subset, verify
from mdm_scaling.options import ConcatConfig, SubsetConfig

U2 = np.dtype("<u2")


def write(prefix: Path, documents: list[list[int]]) -> str:
    with Writer(prefix, U2) as writer:
        for document in documents:
            writer.add(document)
    return str(prefix)


def test_inspect_counts(tmp_path: Path) -> None:
    result = inspect(write(tmp_path / "a", [[1, 2, 3], [4]]))
    assert (result["sequences"], result["documents"], result["tokens"], result["shortest"], result["longest"], result["bin_bytes"]) == (
        2,
        2,
        4,
        1,
        3,
        8,
    )


def test_verify_names_what_is_wrong(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", [[1, 2, 3], [4]])
    assert verify(prefix, 5)["tokens"] == 4
    with pytest.raises(InputError, match="holds token 4, outside"):
        verify(prefix, 4)
    index = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes() + b"\0\0")
    with pytest.raises(InputError, match="2 bytes behind its last token"):
        verify(prefix, 5)
    (tmp_path / "a.idx").write_bytes(index_bytes([3, 1], [0, 1, 1], U2))
    with pytest.raises(InputError, match="document marks"):
        verify(prefix, 5)
    at = index.index(np.array([0, 6], "<i8").tobytes())
    (tmp_path / "a.idx").write_bytes(index[:at] + np.array([0, 4], "<i8").tobytes() + index[at + 16 :])
    with pytest.raises(InputError, match="sequence 1 does not begin"):
        verify(prefix, 5)


def test_parts_are_joined_in_natural_order(tmp_path: Path) -> None:
    for number in range(1, 12):
        write(tmp_path / f"part_{number}", [[number], [number, number]])
    concat(ConcatConfig(output_prefix=tmp_path / "all"), str(tmp_path / "part_*"))
    read = Indexed.open(tmp_path / "all")
    assert [read[2 * at].tolist() for at in range(11)] == [[number] for number in range(1, 12)]
    whole = write(tmp_path / "whole", [tokens for number in range(1, 12) for tokens in ([number], [number, number])])
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path / 'all'}{suffix}").read_bytes() == Path(whole + suffix).read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        concat(ConcatConfig(output_prefix=tmp_path / "all"), str(tmp_path / "part_*"))


def test_a_gap_among_parts_is_refused(tmp_path: Path) -> None:
    for number in (1, 2, 4):
        write(tmp_path / f"part_{number}", [[number]])
    with pytest.raises(InputError, match="part 3 is missing"):
        concat(ConcatConfig(output_prefix=tmp_path / "all"), str(tmp_path / "part_*"))
    with pytest.raises(InputError, match="matches no"):
        concat(ConcatConfig(output_prefix=tmp_path / "all"), str(tmp_path / "nothing*"))


def test_subsets_are_nested_prefixes_with_a_manifest(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(50)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    texts = []
    for tokens in (100, 300):
        out = tmp_path / f"{tokens}.jsonl"
        result = subset(SubsetConfig(tokens=tokens, tokens_per_doc="10", out=out), tmp_path / "a.jsonl.gz")
        assert result["documents"] == tokens // 10
        manifest = json.loads(out.with_name(out.name + ".manifest.json").read_text())
        assert manifest["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
        texts.append(out.read_text())
    assert texts[1].startswith(texts[0])
    with pytest.raises(InputError, match="has 50 lines, but 1000 tokens need 100"):
        subset(SubsetConfig(tokens=1000, tokens_per_doc="10", out=tmp_path / "x.jsonl"), tmp_path / "a.jsonl.gz")
    assert not (tmp_path / "x.jsonl").exists()


def test_an_exact_subset_ends_with_the_document_that_reaches_its_tokens(tmp_path: Path) -> None:
    texts = ["abc", "defgh", "ij", "klmnop"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    options = {"exact": True, "tokenizer": "bytes", "text_column": "body"}
    for tokens, count in ((3, 1), (4, 2), (8, 2), (9, 3), (16, 4)):
        result = subset(SubsetConfig(tokens=tokens, out=tmp_path / f"{tokens}.jsonl", **options), tmp_path / "a.jsonl")  # type: ignore[arg-type]
        assert result["documents"] == count
    with pytest.raises(InputError, match="has 16 tokens, but 17 were asked for"):
        subset(SubsetConfig(tokens=17, out=tmp_path / "x.jsonl", **options), tmp_path / "a.jsonl")  # type: ignore[arg-type]
    assert not list(tmp_path.glob("x.jsonl*"))
    with pytest.raises(InputError, match=r"line 1 of .* has no 'text'"):
        subset(SubsetConfig(tokens=3, out=tmp_path / "x.jsonl", exact=True, tokenizer="bytes"), tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="exact: counts with --tokenizer"):
        SubsetConfig(tokens=3, out=tmp_path / "x.jsonl", exact=True)
