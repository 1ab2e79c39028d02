from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from beacon.eval.lm import documents, passes, run
from beacon.io import load_beacon
from beacon.options import LmConfig
from lm_core.errors import ConfigError
from tests.beacon.test_method import BeaconConformance


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    BeaconConformance().run(folder, budget="2 steps", eval_every="never")
    return folder


def config(trained: Path, **options: object) -> LmConfig:
    values = {"model": str(trained), "eval_data": ["synthetic:markov"], "max_length": 40, "stride": 0, "max_sample_num": 3}
    return LmConfig(**{**values, **options})  # type: ignore[arg-type]


def test_the_default_stride_skips_nothing(trained: Path) -> None:
    assert config(trained, stride=None).step == 40
    assert config(trained, stride=None, max_length=4096).step == 2048


@pytest.mark.parametrize(("length", "size", "stride"), [(100, 30, 7), (30, 30, 5), (31, 30, 30), (99, 30, 1)])
def test_every_token_but_the_first_is_scored_once(length: int, size: int, stride: int) -> None:
    scored = [token for begin, end, first in passes(length, size, stride) for token in range(first, end)]
    assert scored == list(range(1, length))
    assert all(end - begin <= size for begin, end, _ in passes(length, size, stride))


def test_perplexity_is_that_of_the_logits(trained: Path, tmp_path: Path) -> None:
    asked = config(trained, baseline=["full", "truncate"], output_dir=tmp_path / "lm", beacon_ratio=[4])
    result = run(asked)
    model = load_beacon(str(trained))
    total = {"beacon": 0.0, "full": 0.0, "truncate": 0.0}
    count = 0
    with torch.no_grad():
        for text in list(documents(asked, str(trained / "final")))[:3]:
            count += len(text) - 1
            total["beacon"] += float(F.cross_entropy(model(text[None], ratios=[4]).logits[0, :-1], text[1:], reduction="sum"))
            with model.beacon_disabled():
                total["full"] += float(F.cross_entropy(model(text[None]).logits[0, :-1], text[1:], reduction="sum"))
                for begin in range(0, len(text), 8):
                    # a window of 8: its last token predicts the first of the next one
                    piece = text[begin : begin + 9]
                    total["truncate"] += float(
                        F.cross_entropy(model(piece[None, :8]).logits[0, : len(piece) - 1], piece[1:], reduction="sum")
                    )
    for reader, value in total.items():
        assert math.log(result[reader]["perplexity"]) == pytest.approx(value / count, rel=1e-4)
    assert result["beacon"]["kv_bytes"] < result["full"]["kv_bytes"]
    assert json.loads((tmp_path / "lm/result.json").read_text()) == result
    assert (tmp_path / "lm/figures/lm.png").read_bytes()[:4] == b"\x89PNG"


def test_an_interrupted_evaluation_goes_on_and_another_one_is_refused(trained: Path, tmp_path: Path) -> None:
    whole = run(config(trained, output_dir=tmp_path))
    lines = (tmp_path / "items.jsonl").read_text().splitlines()
    (tmp_path / "items.jsonl").write_text("\n".join(lines[:1]) + "\n")
    again = run(config(trained, output_dir=tmp_path))
    assert again["beacon"]["perplexity"] == whole["beacon"]["perplexity"]
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ConfigError, match=r"output_dir: .* holds an evaluation with other options"):
        run(config(trained, output_dir=tmp_path, max_length=30))
