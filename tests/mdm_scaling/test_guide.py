"""What the scripts of the original guide ask of `pretrain` beside training: GPT-2's two files, and scoring alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lm_core.config import build
from lm_core.data.vocab import byte_tokenizer
from lm_core.deepspeed_settings import engine_kind
from lm_core.errors import ConfigError, InputError, Interrupted
from lm_core.models import load_tokenizer
from mdm_scaling.cli import cli
from mdm_scaling.config import PretrainConfig
from mdm_scaling.data.vocabulary import END, gpt2

TINY = ["pretrain", "--objective", "mdm", "--preset", "tiny", "--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "2"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The 256 bytes, `ab` as the only merge, and the token that ends documents."""
    found = {word: number for word, number in byte_tokenizer().get_vocab().items() if number < 256}
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocabulary.write_text(json.dumps(found | {"ab": 256, END: 257}))
    merges.write_text("#version: 0.2\na b\n")
    return vocabulary, merges


def test_two_files_make_the_tokenizer_that_they_describe(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LM_CORE_CACHE", str(tmp_path / "cache"))
    made = load_tokenizer(str(gpt2(*files)))
    assert made("abc").input_ids == [256, ord("c")]
    assert made.decode([256, ord("c")]) == "abc"
    assert (made.eos_token_id, len(made)) == (257, 258)
    files[0].write_text('{"a": 0, "b": 1, "ab": 2}')
    with pytest.raises(InputError, match=r"vocab_file: .* has no <\|endoftext\|>"):
        gpt2(*files)


def test_a_run_is_scored_without_training(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LM_CORE_CACHE", str(tmp_path / "cache"))
    data = [
        "--vocab-file",
        str(files[0]),
        "--merge-file",
        str(files[1]),
        "--data",
        "synthetic:markov",
        "--valid-data-path",
        "synthetic:markov",
    ]
    run = ["--train-samples", "2", "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--precision", "fp32"]
    cli.main([*TINY, *data, *run, "--eval-interval", "never", "--no-tensorboard"], standalone_mode=False)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    seen = []
    monkeypatch.setattr("mdm_scaling.evaluate.print", lambda *words: seen.append(words[0]), raising=False)
    cli.main([*TINY, *data, *run, "--skip-train", "--num-mc", "2", "--eval-iters", "3"], standalone_mode=False)
    assert len(seen) == 1
    assert "upper bound (stratified, mc=2)  6 sequences, 192 tokens" in seen[0]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_run_that_has_not_ended_is_exported_and_scored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    # half of a run: stopped at its first step, long before the budget
    words = [*TINY, "--tokenizer", "bytes", "--data", "synthetic:markov", "--valid-data-path", "synthetic:markov", "--train-samples", "8"]
    words += ["--save", str(run), "--load", str(run), "--precision", "fp32", "--no-tensorboard"]
    with pytest.raises(Interrupted):
        cli.main([*words, "--eval-interval", "never", "--exit-interval", "1"], standalone_mode=False)
    scored = [*words, "--skip-train", "--num-mc", "2", "--eval-iters", "2"]
    cli.main(scored, standalone_mode=False)
    printed = capsys.readouterr().out
    assert "step 1 of the run, which has not ended" in printed
    assert "upper bound (stratified, mc=2)" in printed
    weights = load_file(run / "checkpoints/checkpoint-1/model.safetensors")
    for name, tensor in load_file(run / "final/model.safetensors").items():
        assert torch.equal(tensor, weights[name])
    # what is there already is not written again
    before = (run / "final/config.json").stat().st_mtime_ns
    cli.main(scored, standalone_mode=False)
    assert (run / "final/config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "pipeline"], "engine: pipeline splits a model"),
        (["--engine", "torch"], "engine: torch splits a model"),
        (["--engine", "single", "--zero-stage", "1"], "engine: single has no ZeRO stage"),
    ],
)
def test_words_for_engines_that_do_not_fit_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.main([*TINY, "--data", "synthetic:markov", "--tokenizer", "bytes", "--train-samples", "2", *words], standalone_mode=False)


def test_words_for_engines_mean_the_replicated_one() -> None:
    common = {"objective": "ar", "model": "7M", "train_samples": 512}
    for more in (
        {"engine": "single"},
        {"engine": "torch", "tensor_model_parallel_size": 2},
        {"engine": "pipeline", "pipeline_model_parallel_size": 2},
    ):
        assert engine_kind(build(PretrainConfig, {**common, **more})) == "replicated"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vocab-file", "v.json"], "vocab_file: comes with --merge-file"),
        (["--vocab-file", "v.json", "--merge-file", "m.txt", "--tokenizer", "bytes"], "vocab_file: --tokenizer bytes is given, too"),
        (["--skip-train"], "skip_train: nothing to score"),
    ],
)
def test_what_contradicts_is_refused(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.main([*TINY, "--data", "synthetic:markov", "--train-samples", "2", *more], standalone_mode=False)
