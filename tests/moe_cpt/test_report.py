from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.moe_cpt.test_commands import call


def written(folder: Path, losses: tuple[float, float], **more: Any) -> Path:
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = [
        {"step": 0, "tokens": 0, "flops": 0, "seconds": 0, "eval/docs/loss": losses[0], "eval/docs/standard_error": 0.5},
        {"step": 1, "tokens": 64, "flops": 1, "seconds": 1, "train/loss": 3.0, "data/weight/docs": 0.5, "data/weight/code": 0.5},
        {"step": 2, "tokens": 128, "flops": 2, "seconds": 2, "train/loss": 2.0, "data/weight/docs": 0.7, "data/weight/code": 0.3},
        {"step": 2, "tokens": 128, "flops": 2, "seconds": 2, "eval/docs/loss": losses[1], "eval/docs/standard_error": 0.25},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "router.json").write_text(json.dumps({"step": 2, "load": [[1.0, 3.0]], "importance": [[2.0, 2.0]]}))
    return folder


def test_runs_are_compared_in_a_table_and_pictures(tmp_path: Path) -> None:
    runs = [written(tmp_path / "random" / "run", (9.0, 7.0)), written(tmp_path / "ridge", (6.0, 5.0))]
    found = call("report", *runs, "-o", tmp_path / "out")
    assert found["runs"]["random"]["docs"] == {"before": 9.0, "before_error": 0.5, "after": 7.0, "after_error": 0.25, "tokens": 128}
    assert (tmp_path / "out" / "table.md").read_text().splitlines()[-1] == "| ridge | 128 | 6.000 ± 0.500 | 5.000 ± 0.250 |"
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "losses.png",
        "loads.png",
        *(f"{kind}-{name}.png" for kind in ("router", "weights") for name in ("random", "ridge")),
    }
    assert "two of them are called ridge" in call(
        "report", runs[1], written(tmp_path / "b" / "ridge", (1.0, 1.0)), "-o", tmp_path / "x", code=2
    )
