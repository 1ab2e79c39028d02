"""The folder of an evaluation: items that were scored survive an interruption, results and figures come last."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_core.config import to_dict
from lm_core.engine.state import write_json
from lm_core.errors import ConfigError


class EvalFolder:
    """`items.jsonl` grows item by item; `result.json` and `items.csv` are written at the end. Without a folder nothing is written."""

    def __init__(self, folder: Path | None, config: Any, overwrite: bool) -> None:
        self.folder = folder
        self.items: dict[int, dict[str, Any]] = {}
        if folder is None:
            return
        asked = {
            name: value
            for name, value in json.loads(json.dumps(to_dict(config), default=str)).items()
            if name not in ("output_dir", "overwrite")
        }
        known = folder / "config.json"
        if overwrite:
            for name in ("items.jsonl", "result.json", "items.csv", "config.json"):
                (folder / name).unlink(missing_ok=True)
        elif known.is_file() and json.loads(known.read_text()) != asked:
            raise ConfigError(f"output_dir: {folder} holds an evaluation with other options; add --overwrite, or choose another folder")
        elif not known.is_file() and folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"output_dir: {folder} is not empty; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(known, asked)
        if (folder / "items.jsonl").is_file():
            for line in (folder / "items.jsonl").read_text().splitlines():
                item = json.loads(line)
                self.items[item["item"]] = item

    def add(self, item: dict[str, Any]) -> None:
        self.items[item["item"]] = item
        if self.folder is not None:
            with (self.folder / "items.jsonl").open("a") as file:
                file.write(json.dumps(item) + "\n")

    def finish(self, result: Mapping[str, Any], columns: list[str]) -> None:
        if self.folder is None:
            return
        write_json(self.folder / "result.json", dict(result))
        with (self.folder / "items.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.items[number] for number in sorted(self.items))
