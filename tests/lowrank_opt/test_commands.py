"""The commands beside train: what they print is what the run, its optimizer and other libraries say."""

from __future__ import annotations

import csv
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.lowrank_opt.test_method import LowRankConformance
from transformers import AutoModelForCausalLM

from lm_core.config import build
from lm_core.errors import ConfigError, InputError
from lm_core.models import load_model, using_peft
from lowrank_opt import bench_cuda, estimation
from lowrank_opt.cli import cli
from lowrank_opt.commands import BenchConfig
from lowrank_opt.config import TrainConfig
from lowrank_opt.method import LowRank
from lowrank_opt.models import PRESETS
from lowrank_opt.optimizer_options import OPTIMIZERS


def command(*arguments: object) -> None:
    cli.main([str(argument) for argument in arguments], standalone_mode=False)


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    command(*arguments, "--json")
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with adapters on given weights, and one in 8 bits."""
    folder, suite = tmp_path_factory.mktemp("runs"), LowRankConformance()
    suite.optimizer = "lora"
    suite.run(folder / "lora", mode="finetuning", budget="4 steps", lora={"lora_dropout": 0.0, "lora_alpha": 32}, lr=0.1)
    suite.optimizer = "galore8bit"
    galore = {"rank": 8, "update_proj_gap": 3, "min_8bit_size": 64}
    suite.run(folder / "galore8bit", budget="4 steps", galore=galore)
    return {"lora": folder / "lora", "galore8bit": folder / "galore8bit"}


@pytest.mark.slow
def test_eval_gives_the_loss_that_training_reported(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "eval", "--checkpoint", runs["galore8bit"], "--eval-tokens", 512, "--batch_size", 4)
    reported = json.loads((runs["galore8bit"] / "result.json").read_text())["eval"]["eval/markov/loss"]
    assert found["step"] == 4
    assert found["sources"]["markov"]["loss"] == pytest.approx(reported, rel=1e-5)
    assert found["sources"]["markov"]["perplexity"] == pytest.approx(torch.tensor(reported).exp().item(), rel=1e-4)
    earlier = printed(capsys, "eval", "--checkpoint", runs["galore8bit"], "--validation_files", "synthetic:copy", "--packing", "false")
    assert list(earlier["sources"]) == ["copy"]


@pytest.mark.slow
def test_a_merged_export_holds_the_weights_plus_the_scaled_product_of_the_adapters(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed(capsys, "export", "--checkpoint", runs["lora"], "--out", tmp_path / "merged", "--merge")
    assert found["largest_logit_difference"] < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    saved = load_file(runs["lora"] / "checkpoints/checkpoint-4/model.safetensors")
    for layer in (0, 1):
        base = f"model.layers.{layer}.self_attn.q_proj"
        a, b, weight = (saved[f"{base}.{part}.weight"] for part in ("lora_A.default", "lora_B.default", "base_layer"))
        # alpha 32, rank 8
        assert b.abs().max() > 0.01
        torch.testing.assert_close(merged[f"{base}.weight"], weight + 4 * b @ a)
    command("export", "--checkpoint", runs["lora"], "--out", tmp_path / "half", "--merge", "--dtype", "bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half/model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["use_rslora", "use_dora"])
def test_other_adapters_are_merged_in_float32_whatever_the_training_was_in(kind: str, tmp_path: Path) -> None:
    suite = LowRankConformance()
    suite.optimizer = "lora"
    options = {"mode": "finetuning", "budget": "2 steps", "precision": "bf16", "lr": 0.1, "eval_every": "never"}
    suite.run(tmp_path / "run", lora={"lora_dropout": 0.0, "r": 4, "lora_alpha": 8, kind: True}, **options)
    command("export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "merged", "--merge", "--dtype", "fp32")
    found = load_file(tmp_path / "merged/model.safetensors")
    saved = load_file(tmp_path / "run/checkpoints/checkpoint-2/model.safetensors")
    base = "model.layers.1.self_attn.q_proj"
    a, b, weight = (saved[f"{base}.{part}.weight"].float() for part in ("lora_A.default", "lora_B.default", "base_layer"))
    assert b.abs().max() > 0.01
    if kind == "use_rslora":
        expected = weight + 8 / 4**0.5 * b @ a
    else:
        direction = weight + 8 / 4 * b @ a
        magnitude = next(tensor.float() for name, tensor in saved.items() if name.startswith(base) and "magnitude" in name)
        expected = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found[f"{base}.weight"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[f"{base}.weight"], found[f"{base}.weight"].bfloat16().float())


@pytest.mark.slow
def test_an_adapter_export_loads_in_peft_with_the_logits_of_the_merged_one(runs: dict[str, Path], tmp_path: Path) -> None:
    command("export", "--checkpoint", runs["lora"], "--out", tmp_path / "adapter")
    command("export", "--checkpoint", runs["lora"], "--out", tmp_path / "merged", "--merge")
    with using_peft() as peft:
        model = peft.PeftModel.from_pretrained(load_model("llama_test", presets=PRESETS), str(tmp_path / "adapter")).eval()
    ids = torch.arange(30)[None]
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_plain_export_is_the_trained_model(runs: dict[str, Path], tmp_path: Path) -> None:
    command("export", "--checkpoint", runs["galore8bit"] / "checkpoints/checkpoint-4", "--out", tmp_path / "plain")
    ours, theirs = load_file(tmp_path / "plain/model.safetensors"), load_file(runs["galore8bit"] / "final/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ConfigError, match="plain exists already"):
        command("export", "--checkpoint", runs["galore8bit"], "--out", tmp_path / "plain")
    with pytest.raises(ConfigError, match="galore8bit, which has no adapters"):
        command("export", "--checkpoint", runs["galore8bit"], "--out", tmp_path / "other", "--merge")
    with pytest.raises(ConfigError, match="add --merge"):
        command("export", "--checkpoint", runs["lora"], "--out", tmp_path / "other", "--dtype", "bf16")


@pytest.mark.slow
def test_inspect_counts_every_byte_of_the_state(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "inspect", "--checkpoint", runs["galore8bit"])
    saved = load_file(runs["galore8bit"] / "checkpoints/checkpoint-4/optimizer.safetensors")
    assert found["bytes"] == sum(tensor.nbytes for tensor in saved.values())
    name = "model.model.layers.0.self_attn.q_proj.weight"
    assert found["parameters"][name]["tensors"]["exp_avg_q"] == {"shape": [8, 64], "dtype": "U8", "bytes": 512}
    # step 4, gap 3: refreshed at 1, and at 4 as the first of the staggered ones
    assert found["parameters"][name]["age"] == 0
    assert found["parameters"][name]["refreshes"] == 2


@pytest.mark.slow
def test_compare_writes_table_and_picture(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "table.csv", tmp_path / "runs.png"
    found = printed(capsys, "compare", runs["lora"], runs["galore8bit"], "--out", out, "--picture", picture)
    losses = [line["last_loss"] for line in found["runs"]]
    assert losses == sorted(losses)
    by_run = {line["run"]: line for line in csv.DictReader(out.read_text().splitlines())}
    result = json.loads((runs["galore8bit"] / "result.json").read_text())
    assert float(by_run["galore8bit"]["last_loss"]) == result["eval"]["eval/markov/loss"]
    assert float(by_run["galore8bit"]["measured_gib"]) * 2**30 == pytest.approx(result["memory"]["measured_peak_bytes"])
    state = load_file(runs["galore8bit"] / "checkpoints/checkpoint-4/optimizer.safetensors")
    assert float(by_run["galore8bit"]["state_mib"]) * 2**20 == pytest.approx(sum(tensor.nbytes for tensor in state.values()))
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="has no config"):
        command("compare", tmp_path)


@pytest.mark.parametrize("per_layer", [False, True])
def test_estimate_gives_for_every_optimizer_the_bytes_that_it_keeps(per_layer: bool) -> None:
    values = {"model": "llama_test", "mode": "pretraining", "precision": "bf16", "per_layer": per_layer, "apollo": {"apollo_rank": 8}}
    config = build(TrainConfig, {**values, "optimizer": "galore", "galore": {"rank": 8}})
    found = estimation.side_by_side(config)
    assert next(iter(found)) == "galore"
    for name, memory in found.items():
        made = build(TrainConfig, {**values, "optimizer": name, "galore": {"rank": 8}})
        method = LowRank(made)
        model = method.build()
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [{"names": [n for n, _ in trained], "params": [p for _, p in trained], "weight_decay": 0.0}]
        assert memory.states == method.optimizer(groups).predicted_state_bytes(), name
        gradients = [p.nbytes for _, p in trained]
        assert memory.gradients == (max(gradients) if per_layer else sum(gradients)), name


def test_estimate_without_data_needs_none(capsys: pytest.CaptureFixture[str]) -> None:
    values = ("--model", "llama_7b", "--mode", "pretraining", "--optimizer", "galore8bit", "--rank", 1024, "--dtype", "bf16")
    found = printed(capsys, "estimate", *values, "--per-layer", "true")
    memory = found["optimizers"]["galore8bit"]
    # section 14 of the specification
    assert memory["states"] == 6_483_001_472
    assert (memory["weights"] + memory["states"]) / 2**30 == pytest.approx(18.6, abs=0.05)


def test_the_example_of_the_guide_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--mode pretraining --optimizer lora --model llama_1b --batch_size 32 --num_epochs 20 --shuffle false --lr 3e-4"
    found = printed(capsys, "train", *words.split(), "--dry-run")
    assert found["optimizers"]["lora"]["weights"] == 4 * (1_339_082_752 + 24 * 2 * 8 * 4096)


def test_presets_are_listed_with_their_sizes_and_shown_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "presets")
    assert found["models"]["llama_60m"] == 58_073_600
    # embedding and head, 32 layers of 4 square and 3 rectangular matrices, 65 norms
    assert found["models"]["llama_3b"] == 2 * 32000 * 2560 + 32 * (4 * 2560**2 + 3 * 2560 * 6848) + 65 * 2560
    assert "tiny" in found["runs"]
    assert set(found["learning_rates"]) == set(typing.get_args(OPTIMIZERS))
    assert printed(capsys, "presets", "llama_60m")["hidden_size"] == 512
    with pytest.raises(ConfigError, match="tny is neither"):
        command("presets", "tny")


def test_folders_that_are_no_run_are_refused(tmp_path: Path) -> None:
    for name in ("eval", "inspect"):
        with pytest.raises(InputError, match="holds no complete checkpoint"):
            command(name, "--checkpoint", tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        command("export", "--checkpoint", tmp_path, "--out", tmp_path / "out")


def test_bench_prints_figures_with_targets_and_refuses_unknown_ones(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "bench", "--only", "C7", "C8", "C10", "parity", "codes", "bytes", "galore8bit")
    assert {figure["name"] for figure in found["figures"]} >= {"C7", "C8", "C10", "bytes"}
    judged = [figure for figure in found["figures"] if figure["target"] is not None and figure["name"] != "galore8bit"]
    assert all(figure["pass"] == (figure["value"] <= figure["target"]) for figure in judged)
    # sizes and arithmetic, which no load of the machine changes
    assert all(figure["pass"] for figure in found["figures"]), found["figures"]
    with pytest.raises(ConfigError, match="C99 is no measurement"):
        command("bench", "--only", "C99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_suite_of_a_gpu_is_refused_without_one() -> None:
    with pytest.raises(ConfigError, match="suite: cuda needs a GPU, and torch sees none; use --suite cpu"):
        command("bench", "--suite", "cuda")


def test_the_suite_of_a_gpu_measures_what_it_says() -> None:
    config, here = BenchConfig(repeats=3), "cpu"
    (update,) = bench_cuda.whole_model(config, here, model="llama_test", rank=8, side=256)
    (moved,) = bench_cuda.bandwidth(config, here, side=256)
    (refresh,) = bench_cuda.refresh(config, here, shape=(64, 96), rank=8)
    assert [figure.name for figure in (update, moved, refresh)] == list(bench_cuda.MEASUREMENTS)
    # two products of rank 8 over 14 matrices of 98,816 elements
    assert update.details["operations"] == 2 * 2 * 8 * 98_816
    # weight in and out and gradient in float32; both moments in and out, with one float32 maximum per 256
    assert moved.details["bytes"] == 256 * 256 * (3 * 4 + 2 * 2) + 2 * 2 * 4 * 256
    assert refresh.value > 0
