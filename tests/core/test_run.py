"""From options to a run folder: what a run refuses, writes, and returns. Faults are in test_faults.py, numbers in Conformance."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lm_core.config import build, load
from lm_core.errors import ConfigError, Interrupted
from lm_core.method import Batch, Loss
from lm_core.options import RunConfig
from lm_core.run import run, starting_point
from lm_core.sinks import read
from tests.core.small import NextToken, cli, options, small_run
from tests.core.warm import flags


def train(folder: Path, *more: str, **changed: Any) -> Result:
    """A small run by the command, in this process."""
    return CliRunner().invoke(cli, [*flags(folder, **changed), *more])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(folder: Path, name: str) -> list[float]:
    """The steps at which `name` was logged."""
    return [row["step"] for row in read(folder / "metrics.jsonl") if name in row]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A finished run by the command under --json, with a sample."""
    folder = tmp_path_factory.mktemp("done") / "run"
    settings: dict[str, Any] = {"budget": "10 steps", "save_every": "3", "eval_every": "4", "log_every": 3, "sample_prompt": "ba"}
    return folder, train(folder, "--json", **settings)


# --- what it writes ---


def test_a_finished_run_leaves_a_complete_folder(done: tuple[Path, Result]) -> None:
    folder, result = done
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "config.yaml", "figures", "final", "metrics.jsonl", "record.json", "result.json", "sample.txt",
    ]  # fmt: skip
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= {path.name for path in (folder / "final").iterdir()}
    assert (folder / "sample.txt").read_text().startswith("ba")
    assert {"loss.png", "lr.png"} <= {path.name for path in (folder / "figures").iterdir()}


def test_json_is_one_object_and_the_content_of_the_result(done: tuple[Path, Result]) -> None:
    folder, result = done
    assert json.loads(result.stdout) == json.loads((folder / "result.json").read_text())
    assert result.stdout.count("\n") == 1
    assert "step 10/10" in result.stderr


def test_the_result_says_why_how_far_how_well_and_how_much_memory(done: tuple[Path, Result]) -> None:
    folder, _ = done
    result = json.loads((folder / "result.json").read_text())
    assert result["reason"]["kind"] == "budget"
    assert {name: result["progress"][name] for name in ("steps", "samples", "tokens", "skipped")} == {
        "steps": 10, "samples": 40, "tokens": 1280, "skipped": 0,
    }  # fmt: skip
    assert result["eval"]["eval/markov/loss"] == read(folder / "metrics.jsonl")[-1]["eval/markov/loss"]
    assert 0.5 < result["memory"]["predicted_peak_bytes"] / result["memory"]["measured_peak_bytes"] < 2
    assert result["output_dir"] == str(folder)


def test_a_run_without_held_out_data_is_a_run_without_evaluations(tmp_path: Path) -> None:
    result = train(tmp_path / "run", hold_out=0, budget="2 steps", eval_every="1")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run/result.json").read_text())["eval"] == {}
    assert "Held-out" not in (tmp_path / "run/final/README.md").read_text()


def test_config_yaml_makes_the_same_run(done: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = done
    again = CliRunner().invoke(cli, ["train", "--config", str(folder / "config.yaml"), "--output-dir", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again" / "final" / "model.safetensors").read_bytes() == (folder / "final" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "sample.txt").read_text() == (folder / "sample.txt").read_text()


def test_every_interval_is_kept(done: tuple[Path, Result]) -> None:
    folder, _ = done
    assert steps(folder, "train/loss") == [1, 3, 6, 9]
    # before the first step, when due, and once at the end
    assert steps(folder, "eval/markov/loss") == [0, 4, 8, 10]
    # due at 3, 6 and 9, and always at the end; the two newest are kept
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_the_best_model_is_kept_and_a_resumed_run_knows_how_good_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings: dict[str, Any] = {"eval_every": "2", "save_every": "2", "keep_best": True}
    assert train(folder, budget="4 steps", **settings).exit_code == 0
    losses = {row["step"]: row["eval/markov/loss"] for row in read(folder / "metrics.jsonl") if "eval/markov/loss" in row}
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert json.loads((folder / "best.json").read_text()) == {"step": best, "loss": pytest.approx(losses[best])}
    weights, final = (load_file(folder / name / "model.safetensors") for name in ("best", "final"))
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights.items()) == (best == 4)
    # from here on nothing is better
    (folder / "best.json").write_text('{"step": 2, "loss": 0.0}')
    before = content(folder / "best")
    assert train(folder, budget="8 steps", resume="auto", **settings).exit_code == 0
    assert content(folder / "best") == before


def test_never_means_never(tmp_path: Path) -> None:
    result = small_run(tmp_path, budget="2 steps", eval_every="never", save_every="never", sample_prompt=None)
    assert result["eval"] == {}
    assert steps(tmp_path, "eval/markov/loss") == []
    assert not (tmp_path / "sample.txt").exists()
    # the end is always saved
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_every_limit_of_a_budget_counts(tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"eval_every": "never", "save_every": "never"}
    assert small_run(tmp_path / "tokens", budget="300 tokens, 9 steps", **quiet)["progress"]["steps"] == 3
    assert small_run(tmp_path / "samples", budget="1 hour, 5 samples", **quiet)["progress"]["steps"] == 2


def test_a_run_stops_below_a_loss(tmp_path: Path) -> None:
    result = small_run(tmp_path, budget="99 steps", stop_loss=5.0, eval_every="never")
    assert result["reason"]["kind"] == "loss"
    assert 20 <= result["progress"]["steps"] < 99


# --- where it writes ---


def test_checkpoints_of_the_model_alone_load_and_refuse_a_resume(tmp_path: Path) -> None:
    assert train(tmp_path, "--save-only-model", budget="3 steps", save_every="2", eval_every="never").exit_code == 0
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    assert AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters() > 0
    assert not list(checkpoint.glob("optimizer*"))
    refused = train(tmp_path, "--resume", "auto", budget="4 steps")
    assert refused.exit_code == 4
    assert "holds no optimizer state (--keep-optimizer, --save-only-model)" in refused.output


def test_an_occupied_folder_is_refused_and_untouched(done: tuple[Path, Result]) -> None:
    folder, _ = done
    before = content(folder)
    result = train(folder)
    assert result.exit_code == 2
    message = f"error: output_dir: {folder} already holds a run; add --resume auto, --overwrite, or choose another folder\n"
    assert (result.stdout, result.stderr) == ("", message)
    assert content(folder) == before


def test_kernels_for_a_gpu_are_refused_without_one(tmp_path: Path) -> None:
    result = train(tmp_path / "run", kernels="cuda")
    assert result.exit_code == 2
    assert "kernels: cuda needs a GPU, and this run is on the cpu; use --kernels auto" in result.stderr
    assert "KERNELS_CUDA" not in os.environ
    assert not (tmp_path / "run").exists()


def test_overwrite_starts_from_nothing(tmp_path: Path) -> None:
    small_run(tmp_path, budget="3 steps", seed=1, sample_prompt="ba")
    (tmp_path / "notes.txt").write_text("mine")
    small_run(tmp_path, budget="2 steps", overwrite=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert steps(tmp_path, "train/loss") == [1, 2]
    assert not (tmp_path / "sample.txt").exists()
    assert load(tmp_path / "config.yaml")["seed"] == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_without_a_run_is_free(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert starting_point(tmp_path, "none", free=False) is None
    assert starting_point(tmp_path, "auto", free=False) is None


def test_a_checkpoint_may_be_named_by_its_run_and_go_on_elsewhere(done: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = done
    newest = folder / "checkpoints" / "checkpoint-10"
    assert starting_point(folder, str(folder), free=False) == newest
    assert starting_point(tmp_path, str(folder), free=False) == newest
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="holds another run than the one of"):
        starting_point(tmp_path, str(newest), free=False)


def test_the_default_folder_is_named_by_model_and_package() -> None:
    config = build(RunConfig, {**options(Path("x")), "output_dir": None, "model": "some/where/Model X"})
    assert config.run_folder() == Path("runs/Model-X_lm_core")


# --- a dry run ---


@pytest.mark.parametrize("where", ["free", "occupied"])
def test_a_dry_run_touches_nothing_and_foretells_the_run(done: tuple[Path, Result], tmp_path: Path, where: str) -> None:
    folder = tmp_path / "run" if where == "free" else done[0]
    before = content(folder)
    result = train(folder, "--dry-run", "--json", budget="10k tokens", accumulate=2)
    assert result.exit_code == 0, result.output
    assert content(folder) == before
    assert folder.exists() == (where == "occupied")
    found = json.loads(result.stdout)
    assert found["parameters"] == {"total": 37216, "trained": 37216, "active": 37216}
    assert (found["step"]["samples"], found["step"]["tokens"]) == (8, 256)
    assert (found["run"]["steps"], found["run"]["tokens"]) == (40, 10240)
    assert found["run"]["hours"] == pytest.approx(40 * found["step"]["seconds"] / 3600)
    # float32: weights, gradients, and AdamW's two moments
    assert (found["memory"]["gradients"], found["memory"]["optimizer"]) == (4 * 37216, 8 * 37216)
    assert found["memory"]["weights"] >= 4 * 37216
    assert "parameters  total 37,216" in result.stderr


# --- how it ends ---


def broken(self: NextToken, *args: Any) -> Any:
    raise ZeroDivisionError("a bug")


def interrupting(self: NextToken, *args: Any) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args)


original = NextToken.losses


@pytest.mark.parametrize(
    ("changed", "more", "code", "message"),
    [
        ({}, ["--bugdet", "3 steps"], 2, "--bugdet: is not an option; did you mean --budget?"),
        ({}, ["--set", "evaluate_every=1"], 2, "evaluate_every: is not an option; did you mean eval_every?"),
        (
            {},
            ["--engine", "replicate"],
            2,
            "engine: 'replicate' is wrong; give auto, replicated, sharded or deepspeed; did you mean replicated?",
        ),
        ({"budget": "3 parsecs"}, [], 2, "budget: '3 parsecs' is not a number with a unit"),
        ({}, ["--overwrite", "--resume", "auto"], 2, "overwrite: a run cannot be deleted and resumed (auto) at once"),
        ({"data": ["synthetic:markof"]}, [], 2, "synthetic:markof"),
        ({"data": ["missing.txt"]}, [], 2, "missing.txt"),
        ({"model": "no/such/model"}, [], 2, "model: 'no/such/model' does not exist; use "),
        ({"tokenizer": "no/such/tokenizer"}, [], 2, "tokenizer: 'no/such/tokenizer' does not exist; use "),
        ({"device": "cuda"}, [], 2, "device: cuda is not available"),
        ({"lr": "1e30", "grad_clip": 0}, [], 3, "lower --lr"),
        ({"resume": "nowhere"}, [], 4, "nowhere is not a complete checkpoint"),
    ],
)
def test_what_a_user_can_fix_is_one_error_and_an_exit_code(
    tmp_path: Path, changed: dict[str, Any], more: list[str], code: int, message: str
) -> None:
    if changed.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = train(tmp_path / "run", *more, **changed)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    errors = result.stderr[result.stderr.index("error: ") :]
    assert message in errors
    assert errors.count("error: ") == 1


@pytest.mark.parametrize(("losses", "code"), [(broken, 1), (interrupting, 130)])
def test_bugs_and_signals_have_codes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: Any, code: int) -> None:
    monkeypatch.setattr(NextToken, "losses", losses)
    if code == 130:
        # the estimate runs a batch before anybody listens
        monkeypatch.setattr("lm_core.run.estimate", lambda *args: Foreseen())
    result = train(tmp_path, eval_every="never")
    assert result.exit_code == code
    assert ("ZeroDivisionError: a bug" in result.stderr) == (code == 1)
    assert ("Please report it" in result.stderr) == (code == 1)
    assert ("error: SIGTERM received: saved at step 1; go on with --resume auto" in result.stderr) == (code == 130)


class Foreseen:
    """An estimate that nobody reads."""

    class memory:
        peak = 1


class Measuring(NextToken):
    """Has metrics of its own, one of them under its own name."""

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        yield Loss(model(**{name: batch[name] for name in ("input_ids", "labels")}), {"gate/one": torch.tensor(2.0 * self.targets(batch))})

    def measured(self) -> dict[str, float]:
        return {"gate/two": 3.0}


def test_what_a_method_measures_and_the_weights_of_sources_are_logged(tmp_path: Path) -> None:
    values = options(tmp_path, data=["synthetic:markov@0.75", "synthetic:copy@0.25"], budget="2 steps", log_every=1, eval_every="never")
    config = build(RunConfig, values)
    run(config, Measuring(config))
    logged = [row for row in read(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert [(row["gate/one"], row["gate/two"]) for row in logged] == [(2.0, 3.0)] * 2
    assert [(row["data/weight/markov"], row["data/weight/copy"]) for row in logged] == [(0.75, 0.25)] * 2


def test_evaluations_may_have_other_batches_and_the_first_step_no_record(tmp_path: Path) -> None:
    one = small_run(tmp_path / "one", budget="4 steps", log_every=2)
    other = small_run(tmp_path / "other", budget="4 steps", log_every=2, eval_micro_batch_size=3, log_first=False)
    assert other["eval"]["eval/markov/loss"] == pytest.approx(one["eval"]["eval/markov/loss"], rel=1e-5)
    assert other["eval"]["eval/markov/standard_error"] != one["eval"]["eval/markov/standard_error"]
    assert steps(tmp_path / "one", "train/loss") == [1, 2, 4]
    assert steps(tmp_path / "other", "train/loss") == [2, 4]


def test_a_run_may_stop_at_multiples_of_steps_or_after_minutes_and_go_on(tmp_path: Path) -> None:
    whole = small_run(tmp_path / "whole")
    for at in (3, 6):
        with pytest.raises(Interrupted, match=f"{at} steps are a multiple of 3: saved at step {at}"):
            small_run(tmp_path / "run", stop_every=3, resume="auto")
    with pytest.raises(Interrupted, match=r"1e-09 minutes have passed: saved at step 6"):
        small_run(tmp_path / "run", stop_minutes=1e-9, resume="auto")
    result = small_run(tmp_path / "run", stop_every=3, resume="auto")
    assert result["progress"]["steps"] == whole["progress"]["steps"] == 8
    assert steps(tmp_path / "run", "train/loss") == list(range(1, 9))
