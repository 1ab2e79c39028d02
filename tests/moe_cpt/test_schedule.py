"""Dense layers beside mixtures, fewer experts as training goes on, and documents that do not see each other."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kernels_cuda.head import linear_cross_entropy
from lm_core.config import build
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError
from lm_core.models import CausalLoss
from lm_core.run import run
from moe_cpt.config import TrainConfig
from moe_cpt.data import weighted_sources
from moe_cpt.export import export, merged
from moe_cpt.inspection import load_mixture
from moe_cpt.method import MoeCPT
from moe_cpt.options.conversion import ConvertConfig, ExportConfig
from moe_cpt.plan import parameter_counts
from moe_cpt.schedule import parse_k_schedule
from moe_cpt.split import FILE, Split
from tests.moe_cpt.small import config, dense_model, mixture_folder, tokens
from tests.moe_cpt.test_commands import call


def options(folder: Path, model: Path, **changes: Any) -> TrainConfig:
    shared = {
        "model": str(model), "data": ["synthetic:markov"], "tokenizer": "bytes", "max_length": 32, "warmup": 0.0, "precision": "fp32",
        "schedule": "constant", "lr": 1e-3, "tensorboard": False, "output_dir": str(folder), "micro_batch_size": 2, "held_out_tokens": 128, "eval_every": "2",
        "log_every": 1,
    }  # fmt: skip
    return build(TrainConfig, {**shared, **changes})


@pytest.mark.slow
def test_some_layers_stay_dense(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path, num_selects=8, score_scale_factor=8.0, gate_network="linear", gate_init="zeros", moe_layers=[1])
    model = load_mixture(str(folder))
    assert [block.layer_idx for block in model.blocks()] == [1]
    assert_close(model(tokens()).logits, dense_model()(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert model(tokens()).gate_load.shape == (1, 8)
    assert parameter_counts(model.config.to_dict()).total == sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(ConfigError, match="some of its layers are dense; use --format llama_moe"):
        export(ExportConfig(model=str(folder), format="mixtral", save_path=tmp_path / "mixtral"))
    assert torch.equal(merged(model, Split.load(folder / FILE))(tokens()).logits, dense_model()(tokens()).logits)
    assert export(ExportConfig(model=str(folder), format="llama_moe", save_path=tmp_path / "own"))["difference"] < 1e-4
    run(options(tmp_path / "run", folder, max_steps=1, eval_every="never"), MoeCPT(options(tmp_path / "run", folder, max_steps=1)))
    records = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "moe/layer_1/load" in records
    assert "moe/layer_0/load" not in records


def test_layers_are_named_one_by_one_or_by_what_is_skipped() -> None:
    words = {"model_path": "x", "split_file_path": "s", "save_path": "y"}
    chosen = [build(ConvertConfig, {**words, "moe_layers": text}).chosen_layers() for text in ("all", "3, 1", "-1-2")]
    assert chosen == ["all", [3, 1], {"skip_first": 1, "skip_last": 2}]
    assert config(moe_layers={"skip_first": 1, "skip_last": 0}).converted == [1]
    with pytest.raises(ConfigError, match="moe_layers: 'most' is not all"):
        build(ConvertConfig, {**words, "moe_layers": "most"})
    with pytest.raises(ValueError, match=r"moe_layers: \[2\] of 2 layers; name at least one of 0 to 1"):
        config(moe_layers=[2])


@pytest.mark.slow
def test_fewer_experts_as_training_goes_on_from_the_dense_model(tmp_path: Path) -> None:
    model = mixture_folder(tmp_path, num_selects=2, gate_init="zeros")
    schedule = {"k_schedule": "0:8,2:4:3.5,3:2", "max_steps": 4}
    result = run(options(tmp_path / "run", model, **schedule), MoeCPT(options(tmp_path / "run", model, **schedule)))
    dense = call("eval", "--model", tmp_path / "dense", "--eval-data", "synthetic:markov", "--block_size", 32, "--eval_tokens", 128)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # the first evaluation is that of the dense model
    assert records[0]["eval/markov/loss"] == pytest.approx(dense["markov"]["loss"], rel=1e-4)
    final = load_mixture(str(tmp_path / "run" / "final")).config
    assert (final.num_selects, final.score_scale_factor) == (2, 2.0)
    # an interrupted run goes on with the experts of its step
    parts = [options(tmp_path / "parts", model, **{**schedule, "max_steps": steps}, resume="auto") for steps in (3, 4)]
    for part in parts:
        again = run(part, MoeCPT(part))
    assert again["eval"] == result["eval"]


def test_entries_of_a_schedule_are_checked() -> None:
    assert [(entry.step, entry.num_selects, entry.scale) for entry in parse_k_schedule("0:16, 10:8:2.5")] == [(0, 16, 16.0), (10, 8, 2.5)]
    for text, message in (
        ("16", "'16' is not STEP:K"),
        ("5:8", "do not rise from 0"),
        ("0:8,0:4", "do not rise"),
        ("0:0", "at least one expert"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_k_schedule(text)
    with pytest.raises(ConfigError, match="num_selects: --k-schedule 0:8 sets it"):
        build(TrainConfig, {"model": "x", "data": ["y"], "k_schedule": "0:8", "num_selects": 2})


def test_masked_documents_have_the_losses_they_have_alone(tmp_path: Path) -> None:
    texts = ["first document", "the second one is longer", "third"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = options(
        tmp_path, tmp_path, data=[str(tmp_path / "x.jsonl")], eval_data=[str(tmp_path / "x.jsonl")], max_length=46, document_mask=True
    )
    row = weighted_sources(made, byte_tokenizer()).train["x"].epoch(0)[0]  # type: ignore[attr-defined]
    batch = {name: torch.as_tensor(values)[None] for name, values in row.items()}
    torch.manual_seed(0)
    model = CausalLoss(load_mixture(str(mixture_folder(tmp_path))), loss=linear_cross_entropy)
    ends = [*(batch["position_ids"][0] == 0).nonzero()[:, 0].tolist(), 46]
    assert len(ends) == 4
    alone = [model(batch["input_ids"][:, a:b], batch["labels"][:, a:b]) for a, b in pairwise(ends)]
    assert_close(model(**batch), sum(alone))
    with pytest.raises(ConfigError, match="document_mask: best-fit packing keeps documents apart already"):
        options(tmp_path, tmp_path, document_mask=True, packing="best-fit")
