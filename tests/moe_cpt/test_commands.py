"""The commands as a user runs them, on tiny models and folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lm_core.data.shards import Source
from moe_cpt.cli import cli
from tests.moe_cpt.small import dense_folder, mixture_folder

SOURCES = {"github": "def add(a, b): return a + b\n", "en_book": "It was a dark and stormy night. "}


def call(*words: object, code: int = 0) -> Any:
    """What a command says under --json; its error text where it fails."""
    result = CliRunner().invoke(cli, [*map(str, words), "--json"], standalone_mode=True)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else result.stderr


def raw(folder: Path) -> Path:
    """A folder of sources as text, twenty documents each, with a score."""
    for name, text in SOURCES.items():
        (folder / name).mkdir(parents=True)
        rows = [{"id": n, "content": f"{n} {text * (n + 3)}", "fluency": n / 20} for n in range(20)]
        (folder / name / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_from_text_to_shards_to_a_run(tmp_path: Path) -> None:
    call("tokenize", "-i", raw(tmp_path / "raw"), "-o", tmp_path / "ids", "-t", "bytes", "-f", "jsonl", "-p", 1, "--use_fast")
    first = json.loads((tmp_path / "ids" / "github" / "part.jsonl").read_text().splitlines()[0])
    assert bytes(first["input_ids"][:-1]).decode() == f"0 {SOURCES['github'] * 3}"
    assert first["input_ids"][-1] == 258
    packed = call("pack", "-i", tmp_path / "ids", "-o", tmp_path / "packed", "-t", "bytes")
    call("pack", "-i", tmp_path / "ids", "-o", tmp_path / "wide", "-t", "bytes", "--dtype", "uint32")
    narrow, wide = (Source.open(tmp_path / name / "github") for name in ("packed", "wide"))
    assert (narrow.meta["dtype"], wide.meta["dtype"]) == ("uint16", "uint32")
    assert narrow[7].tolist() == wide[7].tolist()
    shards = Source.open(tmp_path / "packed" / "github")
    assert shards[0].tolist() == first["input_ids"]
    assert packed["github"] == {"kept": 20, "dropped": 0, "tokens": shards.tokens}
    model = mixture_folder(tmp_path)
    common = ("--model", model, "--block_size", 32, "--warmup", 0)
    # tokenised lines and shards are the same documents
    found = [call("data", "check", *common, "--dataset_dir", tmp_path / name) for name in ("ids", "packed")]
    for facts in found:
        assert facts["github"]["documents"] < 20
        assert facts["github"]["share"] == facts["en_book"]["share"] == 0.5  # 0.045 each of the LLaMA shares
    call(
        "train",
        *common,
        "--dataset_dir",
        tmp_path / "packed",
        "--max_steps",
        2,
        "-o",
        tmp_path / "run",
        "--no-tensorboard",
        "--eval_every",
        "never",
    )
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_bad_lines_stop_or_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"content": "good"}\n{"content": \n{"text": "elsewhere"}\n')
    words = ("tokenize", "-i", tmp_path / "x.jsonl", "-o", tmp_path / "out", "-t", "bytes", "-f", "jsonl")
    assert "x.jsonl:2 is not valid JSON" in call(*words, code=2)
    counts = call(*words, "--overwrite", "--on_bad_line", "skip", "--no-append_eos")
    assert counts["x.jsonl"] == {"kept": 1, "dropped": 2, "tokens": 4}
    assert (tmp_path / "out" / "x.jsonl").read_text() == '{"input_ids": [103, 111, 111, 100]}\n'


def test_a_slow_tokenizer_is_refused_where_a_fast_one_is_wanted(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "slow")  # type: ignore[no-untyped-call]
    # it needs none, but a folder without any is taken for one without a tokenizer
    (tmp_path / "slow" / "vocab.json").write_text("{}")
    (tmp_path / "x.txt").write_text("one\n")
    words = ("tokenize", "-i", tmp_path / "x.txt", "-o", tmp_path / "out", "-t", tmp_path / "slow", "-f", "txt", "--use_fast")
    assert "slow has no fast tokenizer; leave out --use_fast" in call(*words, code=2)


def test_text_lines_are_documents_and_ids_of_another_tokenizer_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    call("tokenize", "-i", tmp_path / "x.txt", "-o", tmp_path / "out", "-t", "bytes", "-f", "txt")
    lines = [json.loads(line)["input_ids"] for line in (tmp_path / "out" / "x.jsonl").read_text().splitlines()]
    assert lines == [[111, 110, 101, 258], [116, 119, 111, 258]]
    source = dense_folder(tmp_path / "dense")
    again = ("tokenize", "-i", tmp_path / "out", "-o", tmp_path / "again", "-t", "bytes", "-f", "jsonl", "-c", "input_ids", "-s", source)
    call(*again)
    assert (tmp_path / "again" / "x.jsonl").read_text() == (tmp_path / "out" / "x.jsonl").read_text()


@pytest.mark.slow
def test_processes_do_not_change_what_is_tokenised(tmp_path: Path) -> None:
    raw(tmp_path / "raw")
    for processes in (1, 2):
        call("tokenize", "-i", tmp_path / "raw", "-o", tmp_path / f"{processes}", "-t", "bytes", "-f", "jsonl", "-p", processes)
    for name in SOURCES:
        assert (tmp_path / "1" / name / "part.jsonl").read_bytes() == (tmp_path / "2" / name / "part.jsonl").read_bytes()


def test_filter_keeps_what_lies_within_the_bounds(tmp_path: Path) -> None:
    folder = raw(tmp_path / "raw")
    call(
        "filter", "-i", folder, "-o", tmp_path / "out", "--column", "fluency", "--min", 0.25, "--max", 0.5, "--report", tmp_path / "r.json"
    )
    assert json.loads((tmp_path / "r.json").read_text())["github"] == {"kept": 6, "dropped": 14, "tokens": 0}
    kept = [json.loads(line)["id"] for line in (tmp_path / "out" / "en_book" / "part.jsonl").read_text().splitlines()]
    assert kept == [5, 6, 7, 8, 9, 10]
    message = call("filter", "-i", folder, "-o", tmp_path / "o2", "--column", "score", "--min", 0.25, code=2)
    assert "part.jsonl:1: score is None, not a number" in message


def test_reference_losses_are_those_of_eval(tmp_path: Path) -> None:
    words = ("--model", dense_folder(tmp_path / "dense"), "--validation_dir", "synthetic:copy,synthetic:markov", "--block_size", 32)
    found = call("eval", *words, "--eval_tokens", 256)
    call("ref-loss", *words, "--eval_tokens", 256, "-o", tmp_path / "ref.json")
    assert f"output: {tmp_path / 'ref.json'} exists; add --overwrite" in call("ref-loss", *words, "-o", tmp_path / "ref.json", code=2)
    assert "ref.json cannot be made (File exists)" in call("ref-loss", *words, "-o", tmp_path / "ref.json" / "x.json", code=2)
    assert json.loads((tmp_path / "ref.json").read_text()) == {name: found[name]["loss"] for name in ("copy", "markov")}


def test_plan_prints_the_header_and_needs_no_weights(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 4096}))
    words = ("--model", folder, "--num_tokens", "200*10^9", "--block_size", 4096, "--per_device_train_batch_size", 8)
    found = call("plan", *words, "--gradient_accumulation_steps", 4, "--num_nodes", 14, "--num_gpu_per_node", 8, "--seconds_per_step", 36)
    assert [found[name] for name in ("max_steps", "global_batch_size", "tokens_per_batch")] == [13623, 3584, 14680064]
    assert found["hours"] == pytest.approx(136.23)
    assert found["parameters"]["active"] < found["parameters"]["total"]
    # float32 weights (and a few buffers) and gradients, and AdamW's two moments
    each = [found["memory"][name] / found["parameters"]["total"] for name in ("weights", "gradients", "optimizer")]
    assert each == pytest.approx([4, 4, 8], rel=1e-3)
    assert found["memory"]["activations"] > 0


def test_checklist_marks_what_looks_wrong(tmp_path: Path) -> None:
    words = ("--model", mixture_folder(tmp_path), "--data", "synthetic:markov", "--max_steps", 50, "--warmup", 10, "--block_size", 32)
    fine = call("checklist", *words, "--comment", "a test", "--num_selects", 4, "--score_scale_factor", 2)
    assert [item["name"] for item in fine["items"] if item["problem"]] == []
    assert len(fine["items"]) == 12
    doubtful = call(
        "checklist",
        *words,
        "--score_scale_factor",
        3,
        "--eval_steps",
        70,
        "--num_nodes",
        2,
        "--dataset_dir",
        tmp_path / "none",
        "--warmup",
        50,
    )
    problems = {item["name"] for item in doubtful["items"] if item["problem"]}
    assert problems == {"scale factor", "warmup steps", "evaluation steps", "data path", "GPUs", "comment"}
    message = call("train", *words, "--require-checklist", "-o", tmp_path / "run", code=3)
    assert "require_checklist: comment should be looked at again" in message
    assert not (tmp_path / "run").exists()


def test_header_is_the_first_thing_a_run_says(tmp_path: Path) -> None:
    words = ["train", "--model", str(mixture_folder(tmp_path)), "--data", "synthetic:markov", "--block_size", "32", "--num_tokens", "512"]
    result = CliRunner().invoke(cli, [*words, "--warmup", "0", "-o", str(tmp_path / "run"), "--no-tensorboard", "--eval_every", "never"])
    assert result.stderr.startswith("max_steps: 2\nglobal batch size: 8\n#tokens/batch: 256\nmax_train_samples: 16\n")
    assert "\nparameters: active " in result.stderr
    (launch,) = (line.removeprefix("launch: ") for line in result.stderr.splitlines() if line.startswith("launch: "))
    assert json.loads(launch)["num_tokens"] == 512


def test_processes_that_were_not_started_are_missed_before_anything_is_loaded(tmp_path: Path) -> None:
    message = call("train", "--model", "no/such/model", "--data", "x", "--num_nodes", 2, "--num_gpu_per_node", 8, code=2)
    assert "num_gpu_per_node: 2 x 8 processes are named, but this run has 1" in message


def test_calibrated_factors_reach_the_converted_model(tmp_path: Path) -> None:
    model, dense = mixture_folder(tmp_path, num_selects=8, gate_network="linear", gate_init="zeros"), tmp_path / "dense"
    words = ("--model_path", model, "--dense_path", dense, "--data", "synthetic:markov", "--max_tokens", 128, "--max_length", 32)
    # all experts at 1/8 each are an eighth of the dense layer, whatever the measure
    for mode in ("lsq", "rms", "unbiased"):
        found = call("calibrate-scale", *words, "--mode", mode, "--layerwise", "--save_path", tmp_path / f"{mode}.json")
        assert found["scales"] == pytest.approx([8.0, 8.0], rel=1e-5)
    again = ("convert", "--model_path", dense, "--split_file_path", model / "split.safetensors", "--save_path", tmp_path / "again")
    call(*again, "--score_scale_factor_file_path", tmp_path / "lsq.json", "--num_selects", 8)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["score_scale_factor"] == pytest.approx([8.0, 8.0], rel=1e-5)
    (tmp_path / "short.json").write_text("[1.0]")
    message = call(*again, "--score_scale_factor_file_path", tmp_path / "short.json", "--overwrite", code=2)
    assert "holds 1 numbers for 2 layers" in message


def test_split_and_convert_from_the_command(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    call("split", "random", "--model_path", source, "--num_experts", 8, "--save_path", tmp_path / "s.safetensors")
    words = ("convert", "--model_path", source, "--split_file_path", tmp_path / "s.safetensors", "-o", tmp_path / "moe")
    found = call(*words, "--num_selects", 2)
    assert found["active"] < found["dense"] < found["total"]
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["score_scale_factor"] == 4.0
    assert "num_selects: 9 of 8 experts; use 1 to 8" in call(*words, "--num_selects", 9, "--overwrite", code=2)
    assert math.isfinite(call("eval", "--model", tmp_path / "moe", "--eval-data", "synthetic:copy[3]", "--block_size", 32)["copy"]["loss"])


@pytest.mark.slow
def test_a_dense_model_becomes_a_stock_mixture_in_one_command(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    call("split", "random", "--model_path", source, "--num_experts", 8, "--save_path", tmp_path / "s.safetensors")
    words = ("convert", "--model_path", source, "--split_file_path", tmp_path / "s.safetensors", "-o", tmp_path / "moe", "--num_selects", 2)
    assert "format: mixtral has a linear router; add --gate_network linear" in call(*words, "--format", "mixtral", code=2)
    call(*words, "--gate_network", "linear", "--format", "mixtral")
    written = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (written["model_type"], written["num_experts_per_tok"]) == ("mixtral", 2)
    assert "exists; add --overwrite" in call(*words, "--gate_network", "linear", "--format", "mixtral", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe", "s.safetensors"]
    call(*words, "--dtype", "bfloat16", "--overwrite")
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "moe" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.slow
def test_from_activity_to_a_stock_model(tmp_path: Path) -> None:
    source, text = dense_folder(tmp_path / "dense"), ("--data", "synthetic:markov", "--block_size", 32)
    found = call("features", "--model_path", source, *text, "--what", "act", "--max_tokens", 256, "--save_path", tmp_path / "act")
    assert found == {"save_path": str(tmp_path / "act"), "tokens": 256, "bytes": 2 * 2 * 256 * 64}
    words = ("--model_path", source, "--num_experts", 6, "--save_path", tmp_path / "s.safetensors")
    made = call("split", "activation", *words, "--features", tmp_path / "act", "--num_shared_experts", 2)
    assert (made["num_experts"], made["shared"], len(made["cost"])) == (6, 16, 2)
    words = ("convert", "--model_path", source, "--split_file_path", tmp_path / "s.safetensors", "--save_path", tmp_path / "moe")
    calibration = ("--gate_init", "ridge", "--calibration_data", "synthetic:markov", "--calibration_tokens", 512)
    call(*words, "--num_selects", 2, "--gate_network", "linear", *calibration)
    call(
        "train",
        "--model",
        tmp_path / "moe",
        *text,
        "--max_steps",
        2,
        "--warmup",
        0,
        "-o",
        tmp_path / "run",
        "--no-tensorboard",
        "--eval_every",
        "never",
    )
    looked = call("inspect", "--model", tmp_path / "run" / "final", *text, "--max_tokens", 256)
    assert [sum(shares) for shares in looked["share"]] == pytest.approx([1, 1])
    exported = call("export", "--model", tmp_path / "run" / "final", "--format", "granitemoeshared", "--save_path", tmp_path / "out")
    assert exported["difference"] < 1e-4
    # the split travelled through training
    assert (
        call("export", "--model", tmp_path / "run" / "final", "--format", "llama", "--save_path", tmp_path / "dense2")["difference"] < 1e-4
    )
