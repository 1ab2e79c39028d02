from __future__ import annotations

import json
from pathlib import Path

import pytest

from beacon.eval import cost
from beacon.options import CostConfig


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, dict[str, float]]]]:
    folder = tmp_path_factory.mktemp("cost") / "cost"
    settings = {"model": "llama_tiny", "beacon_window": 32, "beacon_ratio": [2, 8], "lengths": [64, 128], "tokens": 2, "baseline": ["full"]}
    return folder, cost.run(CostConfig(**settings, output_dir=folder))


def test_bytes_are_those_of_the_formula_and_of_every_token(found: tuple[Path, dict[str, dict[str, dict[str, float]]]]) -> None:
    # 2 layers, 2 key heads of 16 numbers of 4 bytes, keys and values
    entry = 2 * 2 * 2 * 16 * 4
    assert {who: {n: value / entry for n, value in costs["kv_bytes"].items()} for who, costs in found[1].items()} == {
        "ratio 2": {"64": 32, "128": 64}, "ratio 8": {"64": 8, "128": 16}, "full": {"64": 64, "128": 128},
    }  # fmt: skip
    assert all(
        seconds > 0 for costs in found[1].values() for name in ("prefill_seconds", "decode_seconds") for seconds in costs[name].values()
    )


def test_the_folder_holds_the_table_and_the_picture(found: tuple[Path, dict[str, dict[str, dict[str, float]]]]) -> None:
    folder, result = found
    assert json.loads((folder / "result.json").read_text()) == result
    assert len((folder / "items.csv").read_text().splitlines()) == 7
    assert (folder / "figures" / "cost.png").read_bytes().startswith(b"\x89PNG")
