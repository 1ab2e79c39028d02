"""Options of scripts for Megatron and DeepSpeed, and what they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import ByteLevelBPETokenizer

from lm_core.config import build
from lm_core.errors import ConfigError, ResumeRefused
from mdm_scaling.cli import cli
from mdm_scaling.config import PretrainConfig, settled
from mdm_scaling.method import Pretrain
from mdm_scaling.train import pretrain

TINY: dict[str, Any] = {
    "objective": "mdm", "model": "tiny", "tokenizer": "bytes", "data": ["synthetic:markov"], "max_length": 32, "num_workers": 0, "micro_batch_size": 4,
    "global_batch_size": 4, "train_samples": 24, "precision": "fp32", "device": "cpu", "tensorboard": False, "eval_every": "2", "eval_iters": 2,
    "save_every": "3", "warmup": 0.1, "keep_best": False, "log_every": 1,
}  # fmt: skip


def options(**given: Any) -> PretrainConfig:
    layers = PretrainConfig.further_layers({**TINY, **given})
    return settled(build(PretrainConfig, TINY, *layers, given=[given]))


def curve(folder: Path, name: str) -> list[float]:
    return [record[name] for line in (folder / "metrics.jsonl").read_text().splitlines() if name in (record := json.loads(line))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six updates, with a checkpoint after three."""
    folder = tmp_path_factory.mktemp("spellings") / "run"
    pretrain(options(output_dir=folder))
    return folder


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"optimizer": "adam-cpu", "zero_stage": 2}, {"offload": "optimizer"}),
        ({"offload_optimizer": "cpu", "zero_stage": 2}, {"offload": "optimizer"}),
        ({"offload_param": "cpu", "zero_stage": 3}, {"offload": "all"}),
        ({"recompute": "full"}, {"gradient_checkpointing": True}),
        ({"objective": "ar", "use_order_list": True}, {"num_order_list": 1}),
        ({"objective": "ar", "use_order_list": True, "num_order_list": 4}, {"num_order_list": 4}),
        ({"wandb_mode": "offline"}, {"wandb": "offline"}),
        ({"wandb_mode": "disabled"}, {"wandb": "off"}),
        ({"wandb_project": "scaling"}, {"wandb": "online", "wandb_project": "scaling"}),
        ({"wandb_project": "scaling", "wandb": "offline"}, {"wandb": "offline"}),
        ({"wandb_project": "scaling", "wandb_mode": "disabled"}, {"wandb": "off"}),
        ({"eval_data": ["rolling"]}, {"eval_window": "rolling", "eval_data": []}),
        ({"tokenizer": "byte"}, {"tokenizer": "bytes"}),
        ({"tokenizer": "hf:smollm2-135m"}, {"tokenizer": "smollm2-135m"}),
    ],
)
def test_a_spelling_means_options_of_core(given: dict[str, Any], expected: dict[str, Any]) -> None:
    made = options(**given)
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_order_list": False, "num_order_list": 2, "objective": "ar"}, "use_order_list: false, but there are 2 orders"),
        ({"recompute": "none", "gradient_checkpointing": True}, "recompute: none means gradient_checkpointing False"),
        ({"recompute": "selective", "gradient_checkpointing": True}, "recompute: selective, but --gradient-checkpointing"),
        ({"offload_optimizer": "none", "offload_param": "cpu", "zero_stage": 3}, "offload_optimizer: none, but parameters"),
        ({"recipe": "datablations"}, "recipe: 'datablations' is none of ar_140m_quickstart"),
        ({"override_resume": ["objectiv"]}, "override_resume: 'objectiv' is no option; did you mean objective?"),
        ({"tokenizer": "gpt2-bpe"}, "tokenizer: gpt2-bpe is made of --vocab-file and --merge-file"),
    ],
)
def test_contradictions_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**given)


def test_two_names_of_the_model_are_refused() -> None:
    words = ["pretrain", "--objective", "ar", "--preset", "117M", "--init-from", "smollm2-135m", "--budget", "1 steps"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2
    assert "--preset 117M and --init-from smollm2-135m: are the same option; give one of them" in result.output


def test_a_recipe_is_the_first_file_of_options(tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("max_length: 128\n")
    result = CliRunner().invoke(cli, ["pretrain", "--recipe", "tiny-cpu", "--config", str(more), "--lr", "0.5", "--print-config", "--json"])
    made = json.loads(result.stdout)
    assert (made["model"], made["max_length"], made["lr"], made["warmup"]) == ("tiny", 128, 0.5, 0.1)


def test_inverse_square_root_is_its_short_name() -> None:
    from lm_core.progress import Progress, Size

    rates = [
        options(schedule=name, train_samples=1000, warmup=100).learning_rate(Progress(samples=396), Size(samples=4), 1)
        for name in ("inverse-square-root", "inverse-sqrt")
    ]
    assert rates[0] == rates[1] == pytest.approx(2e-4 * (100 / 400) ** 0.5)


def test_gpt2s_files_make_its_tokenizer(tmp_path: Path) -> None:
    text = ["the cat sat on the mat", "a dog's dinner, 12 o'clock"] * 20
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(text, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(tmp_path))
    made = Pretrain(options(tokenizer="gpt2-bpe", vocab_file=tmp_path / "vocab.json", merge_file=tmp_path / "merges.txt")).tokenizer()
    for line in (*text[:2], "unseen wörds\n"):
        assert made(line).input_ids == trained.encode(line).ids
        assert made.decode(made(line).input_ids) == line
    assert made.eos_token_id == trained.token_to_id("<|endoftext|>")


# --- what the options do ---


def test_a_resumed_run_may_change_what_it_is_told_it_may(run: Path, tmp_path: Path) -> None:
    start = run / "checkpoints" / "checkpoint-3"
    changes: dict[str, Any] = {"objective": "ar", "seed": 7, "global_batch_size": 8, "train_samples": 48}
    refused = dict(changes)
    while refused:
        allowed = list(changes.keys() - refused.keys())
        with pytest.raises(ResumeRefused) as caught:
            pretrain(options(**changes, resume=str(start), output_dir=tmp_path / "run", override_resume=allowed))
        del refused[str(caught.value).partition(":")[0]]
    result = pretrain(options(**changes, resume=str(start), output_dir=tmp_path / "run", override_resume=list(changes)))
    assert result["progress"]["steps"] > 3
    assert result["scaling"]["objective"] == "ar"


def test_a_rolling_evaluation_goes_on_behind_the_last_one_and_after_a_restart(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"eval_window": "rolling", "lr": 1e-12, "num_mc": 2}
    pretrain(options(output_dir=tmp_path / "run", **shared))
    found = curve(tmp_path / "run", "eval/markov/loss")
    # before the first step, and after 2, 4 and 6: eight sequences each, none of them twice
    method = Pretrain(options(**shared))
    method.data(method.tokenizer())
    (rows,) = method.held
    assert rows.total > 32
    seen = []
    for rows.window in range(4):
        seen += [tuple(rows[k]["input_ids"]) for k in range(len(rows))]
    assert len(rows) == 8
    assert len(set(seen)) == 32
    assert len(set(found)) == 4
    rows.window = rows.total
    assert tuple(rows[0]["input_ids"]) == seen[0]
    # stopped behind the second evaluation, the run goes on with the third
    import shutil

    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-6")
    pretrain(options(output_dir=tmp_path / "run", resume="auto", **shared))
    assert curve(tmp_path / "run", "eval/markov/loss") == found


def test_a_refused_run_leaves_the_result_of_the_one_that_is_there(run: Path) -> None:
    before = (run / "result.json").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        pretrain(options(output_dir=run, seed=9))
    assert (run / "result.json").read_bytes() == before


@pytest.mark.parametrize("changes", [{"recompute": "selective"}, {"recompute": "full"}, {"optimizer": "adam-torch"}])
def test_recomputing_and_torchs_own_optimizer_change_no_loss(changes: dict[str, Any], tmp_path: Path) -> None:
    dropping = {"attention_dropout": 0.2, "hidden_dropout": 0.2, "eval_every": "never", "save_every": "never", "train_samples": 12}
    for name, more in (("plain", {}), ("changed", changes)):
        pretrain(options(output_dir=tmp_path / name, **dropping, **more))
    assert curve(tmp_path / "changed", "train/loss") == pytest.approx(curve(tmp_path / "plain", "train/loss"), rel=1e-5)


def test_selective_recomputation_keeps_no_attention() -> None:
    kept = {}
    for recompute in (None, "selective", "full"):
        method = Pretrain(options(recompute=recompute, max_length=128))
        method.vocabulary = 259
        model, tokens = method.build(), torch.arange(128)[None]
        sizes = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens, tokens.flatten())
        kept[recompute] = sum(sizes)
    assert kept["full"] < kept["selective"] < kept[None]
