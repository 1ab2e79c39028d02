from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.mdm_scaling.small import class_elsewhere, network
from transformers import AutoModelForCausalLM

from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError
from mdm_scaling.export import bring, export
from mdm_scaling.model import load_network
from mdm_scaling.options import ExportConfig, ImportConfig


def saved(objective: Any, folder: Path) -> str:
    network(objective, vocabulary=259).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_export_is_bitwise_and_keeps_padded_rows(objective: Any, tmp_path: Path) -> None:
    source = saved(objective, tmp_path / "a")
    export(ExportConfig(checkpoint=source, out=tmp_path / "b"))
    before, after = (load_network(name).state_dict() for name in (source, str(tmp_path / "b")))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ConfigError, match="is there already"):
        export(ExportConfig(checkpoint=source, out=tmp_path / "b"))


def test_a_causal_export_is_a_stock_llama(tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=saved("ar", tmp_path / "a"), out=tmp_path / "b"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "b")).__name__ == "LlamaForCausalLM"


@pytest.mark.slow
def test_a_masked_export_loads_without_this_package(tmp_path: Path) -> None:
    export(ExportConfig(checkpoint=saved("mdm", tmp_path / "a"), out=tmp_path / "b"))
    assert class_elsewhere(tmp_path / "b", tmp_path) == "MdmForMaskedLM"


def test_an_imported_model_keeps_its_weights(tmp_path: Path) -> None:
    source = saved("ar", tmp_path / "a")
    result = bring(ImportConfig(objective="mdm", out=tmp_path / "b"), source)
    assert (result["class"], result["vocabulary"]) == ("MdmForMaskedLM", 259)
    before, after = load_network(source).state_dict(), load_network(str(tmp_path / "b")).state_dict()
    assert all(torch.equal(before[name], after[name][: len(before[name])]) for name in before)
