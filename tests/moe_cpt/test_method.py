from __future__ import annotations

import importlib.util
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lm_core.config import build
from lm_core.data.loader import Loader
from lm_core.data.shards import Source
from lm_core.data.vocab import byte_tokenizer
from lm_core.engine import Engine
from lm_core.errors import ConfigError, RunFailed
from lm_core.estimate import peak_flops
from lm_core.evaluate import Score, Scores
from lm_core.method import Batch, Method
from lm_core.models import load_tokenizer
from lm_core.options import RunConfig
from lm_core.run import run
from lm_core.testing import Conformance, spawn
from lm_core.train import train_step
from moe_cpt.config import TrainConfig
from moe_cpt.convert import convert
from moe_cpt.inspection import load_mixture
from moe_cpt.method import MoeCPT, StepSums
from moe_cpt.routing import Routing, balance_loss
from moe_cpt.split import split_ffn
from tests.moe_cpt.small import dense_folder, mixture_folder

TINY: dict[str, Any] = {
    "model": "llama_test",
    "from_dense": "random",
    "num_experts": 8,
    "num_selects": 2,
    "tokenizer": "bytes",
    "data": ["synthetic:markov"],
    "max_length": 64,
    "warmup": 0.0,
    "lr": 5e-3,
    "precision": "fp32",
}


@pytest.mark.slow
class TestMixture(Conformance):
    # importance and load of later micro-batches are not known yet when an earlier one is back-propagated
    split_invariant = False

    def configure(self, **options: Any) -> RunConfig:
        options["held_out_tokens"] = options.pop("eval_tokens", 0)
        return build(TrainConfig, {**TINY, "balance_scope": "global", **options})

    def method(self, config: RunConfig) -> Method:
        assert isinstance(config, TrainConfig)
        return MoeCPT(config)


class Dynamic(TestMixture):
    """Two sources whose shares move at every second step."""

    def configure(self, **options: Any) -> RunConfig:
        reference = Path(tempfile.gettempdir()) / "moe_cpt_reference.json"
        reference.write_text(json.dumps({"markov": 0.5, "copy": 3.5}))
        changed = {"data": ["synthetic:markov,synthetic:copy"], "dynamic_data_selection": "sheared_llama", "reference_loss": reference}
        return super().configure(**{**options, **changed, "eval_every": "2"})


def test_a_loss_that_is_not_finite_leaves_the_shares(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    suite = Dynamic()
    method, _, loader = suite.assemble(suite.options(tmp_path))
    before = loader.weights
    score = Score(loss=math.nan, standard_error=0.0, targets=1, tokens=1, samples=1)
    method.after_eval(Scores({"markov": score, "copy": score}), loader)
    assert loader.weights == before
    assert "source weights kept" in caplog.text


def test_dead_experts_are_counted_and_estimates_are_not(tmp_path: Path) -> None:
    method, engine, loader = assembled(tmp_path, num_selects=1)
    named = dict(engine.model.named_parameters())
    with torch.no_grad():
        for layer in range(2):
            named[f"model.model.layers.{layer}.mlp.router.noise.weight"].fill_(0.0)
            # every token prefers expert 3 by far more than the noise
            router = method.hf_model(engine.model).model.layers[layer].mlp.router
            router.fc2.weight.zero_()
            router.register_forward_hook(lambda module, inputs, output: (output[0] + 100 * (torch.arange(8) == 3), output[1]))
    batches = next(loader)
    for _ in range(2):  # the first time stands for the estimate
        engine.accumulate(method, batches, 1)
    values = method.measured()
    assert values["moe/dead_experts"] == 14
    assert values["moe/layer_0/load"] == 8.0
    assert method._meter.last_load[1][3] == 4 * 64  # type: ignore[attr-defined]
    assert method.measured() == {}


def test_a_run_says_once_when_it_will_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    method, _, _ = assembled(tmp_path, budget="3620 steps")
    assert isinstance(method, MoeCPT)
    for step in (18, 19, 20):
        method._meter._place, method._meter._timed = (step, 0), {"seconds": 4.0, "tokens": 80, "steps": 2}
        with caplog.at_level("INFO"):
            method.measured()
    assert caplog.text.count("ETA: hours: 2.00, until ") == 1


@pytest.mark.parametrize("from_dense", ["random", "none"])
def test_debug_mode_tries_a_run_on_two_layers_and_one_file(from_dense: str, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense", num_hidden_layers=4)
    if from_dense == "none":
        split = split_ffn(source, "random", num_experts=4, seed=3)
        convert(source, split, tmp_path / "moe", num_selects=2, score_scale_factor=[1.0, 2.0, 3.0, 4.0], moe_layers=[1, 2, 3])
    (tmp_path / "data" / "texts").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "data" / "texts" / f"{name}.jsonl").write_text("".join(f'{{"text": "{name * 40} {n}"}}\n' for n in range(40)))
    routing = {"from_dense": "random", "num_experts": 4, "num_selects": 2} if from_dense == "random" else {}
    config = build(
        TrainConfig,
        {
            "model": str(source if routing else tmp_path / "moe"), "debug_mode": True, "data": [str(tmp_path / "data")],
            "prob_map": '{"texts": 1}', "max_length": 16, "micro_batch_size": 2, "max_steps": 2, "warmup": 0, "precision": "fp32",
            "tensorboard": False, "output_dir": tmp_path / "run", "data_cache_dir": tmp_path / "cache", **routing,
        },
    )  # fmt: skip
    method = MoeCPT(config)
    run(config, method)
    method.keep_split()
    made = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert made["num_hidden_layers"] == 2
    assert made["score_scale_factor"] == (2.0 if routing else [1.0, 2.0])
    assert (tmp_path / "run" / "final" / "split.safetensors").exists() == bool(routing)
    (shards,) = (path for path in (tmp_path / "cache" / "shards").iterdir() if path.is_dir())
    assert len(Source.open(shards)) == 40


def test_the_type_of_a_model_is_compared_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_type: llama_moe, but llama_test is a llama"):
        MoeCPT(build(TrainConfig, {**TINY, "model_type": "llama_moe"})).model_config()
    assert MoeCPT(build(TrainConfig, {**TINY, "model_type": "llama"})).model_config().num_experts == 8


def test_a_run_draws_its_routers(tmp_path: Path) -> None:
    config = build(
        TrainConfig, {**TINY, "budget": "2 steps", "log_every": 1, "output_dir": tmp_path, "eval_every": "never", "tensorboard": False}
    )
    run(config, MoeCPT(config))
    assert (tmp_path / "figures" / "router.png").stat().st_size > 5000
    assert len(json.loads((tmp_path / "router.json").read_text())["load"]) == 2
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[1]["speed/mfu"] == pytest.approx(records[1]["speed/tokens_per_gpu_second"] * (6 * 55_936 + 12 * 2 * 64 * 64) / 312e12)


def assembled(folder: Path, **options: Any) -> tuple[Method, Engine, Loader]:
    suite = TestMixture()
    return suite.assemble(suite.options(folder, **options))


def gradients(folder: Path, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step."""
    method, engine, loader = assembled(folder, **options)
    batches = next(loader)
    targets = sum(method.targets(batch) for batch in batches)
    sums = engine.accumulate(method, batches, targets)
    return float(sums.loss) / targets, {name: part.grad for name, part in engine.model.named_parameters() if part.grad is not None}


def test_the_reported_loss_is_cross_entropy_whatever_the_balance_weight(tmp_path: Path) -> None:
    light, heavy = (gradients(tmp_path / name, gate_balance_loss_weight=weight) for name, weight in (("a", 0.0), ("b", 1.0)))
    assert light[0] == heavy[0]
    router = "model.model.layers.0.mlp.router.fc1.weight"
    assert not torch.allclose(light[1][router], heavy[1][router])


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_the_gradient_is_that_of_cross_entropy_plus_balance(scope: str, tmp_path: Path) -> None:
    method, engine, loader = assembled(tmp_path, balance_scope=scope, gate_balance_loss_weight=0.5)
    batches = next(loader)
    targets = sum(method.targets(batch) for batch in batches)
    engine.accumulate(method, batches, targets)
    model = method.hf_model(engine.model)
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    # the model's own loss is a mean, with the same noise
    batch = batches[0]
    routing = Routing(index=batch.index, seed=method.config.seed)
    logits = model.model(batch["input_ids"], routing=routing).last_hidden_state @ model.lm_head.weight.T
    ce = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    (ce + balance_loss(routing.sums("importance_N"), routing.sums("load_N"), 0.5)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_global_balance_sums_over_the_micro_batches_of_a_step(tmp_path: Path) -> None:
    """With the earlier part constant, the last micro-batch sees the importance of the whole step."""
    sums = StepSums()
    parts = [torch.rand(2, 1, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def add(number: int, index: int, step: int) -> list[torch.Tensor]:
        batch = Batch({}, index=torch.tensor([index]), step=step)
        return list(sums.add(batch, parts[number][0], parts[number][1], torch.tensor(10)))

    add(0, 0, step=0)
    importance, load, targets = add(1, 1, step=0)
    torch.testing.assert_close(importance, parts[0][0] + parts[1][0])
    torch.testing.assert_close(load, parts[0][1] + parts[1][1])
    assert float(targets) == 20
    # a new step, and the same step begun again
    assert float(add(2, 2, step=1)[2]) == 10
    assert float(add(2, 2, step=1)[2]) == 10


def _norms(folder: Path, micro_batch: int, scope: str) -> float:
    method, engine, loader = assembled(folder, micro_batch_size=micro_batch, balance_scope=scope, gate_balance_loss_weight=1.0)
    return train_step(engine, method, next(loader), 1e-3).grad_norm


@pytest.mark.slow
def test_global_balance_is_the_same_on_two_processes_and_micro_balance_is_not(tmp_path: Path) -> None:
    for scope, same in (("global", True), ("micro", False)):
        one = _norms(tmp_path / scope, 4, scope)
        two = spawn(_norms, tmp_path / f"{scope}-2", 2, scope)[0]
        assert (abs(one - two) < 1e-4 * one) == same


def test_router_options_override_the_checkpoint_and_the_run_keeps_a_loadable_folder(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path)
    config = build(
        TrainConfig,
        {
            "model": str(folder),
            "data": ["synthetic:markov"],
            "max_length": 32,
            "budget": "2 steps",
            "warmup": 0.0,
            "output_dir": tmp_path / "run",
        }
        | {"num_selects": 1, "score_scale_factor": 8.0, "eval_every": "never", "tensorboard": False, "micro_batch_size": 2},
    )
    run(config, MoeCPT(config))
    written = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert (written["num_selects"], written["score_scale_factor"], written["num_experts"]) == (1, 8.0, 8)
    # a checkpoint is a model by itself
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    assert load_mixture(str(checkpoint)).config.num_selects == 1
    assert len(load_tokenizer(str(checkpoint))) == 259
    assert (checkpoint / "split.safetensors").read_bytes() == (folder / "split.safetensors").read_bytes()


def test_frozen_routers_stay_and_the_rest_moves(tmp_path: Path) -> None:
    _, engine, _ = assembled(tmp_path, freeze_router=True)
    trained = {name for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
    assert not any(".router." in name for name in trained)
    assert any(".experts." in name for name in trained)


def test_a_dense_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = build(TrainConfig, {"model": str(dense_folder(tmp_path / "dense")), "data": ["synthetic:markov"], "max_length": 32})
    with pytest.raises(ConfigError, match="is a llama model, not a mixture of experts; add --from-dense random"):
        MoeCPT(config).build()


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    dense = dense_folder(tmp_path / "dense", vocab_size=200)
    config = build(TrainConfig, {**TINY, "model": str(dense), "max_length": 32})
    with pytest.raises(ConfigError, match="tokenizer: 259 entries, but"):
        MoeCPT(config).data(byte_tokenizer())


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_attention_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    options = {"model": str(mixture_folder(tmp_path)), "data": ["synthetic:markov"], "max_length": 32}
    with pytest.raises(ConfigError, match="attn_implementation: flash_attention_2 cannot be had here"):
        MoeCPT(build(TrainConfig, {**options, "attn_implementation": "flash_attention_2"})).build()


def test_too_long_samples_are_refused(tmp_path: Path) -> None:
    config = build(TrainConfig, {"model": str(mixture_folder(tmp_path)), "data": ["synthetic:markov"], "max_length": 65})
    with pytest.raises(ConfigError, match="max_length: 65 is beyond the 64 positions"):
        MoeCPT(config).build()


def test_infinite_router_logits_stop_the_run_by_layer_and_step(tmp_path: Path) -> None:
    method, engine, loader = assembled(tmp_path)
    with torch.no_grad():
        dict(engine.model.named_parameters())["model.model.layers.1.mlp.router.fc2.weight"].fill_(torch.nan)
    batches = next(loader)
    with pytest.raises(RunFailed, match="logits of layer 1 are not finite in step 0"):
        engine.accumulate(method, batches, 1)


def test_weight_decay_spares_norms_and_router_noise(tmp_path: Path) -> None:
    _, engine, _ = assembled(tmp_path)
    spared = {name for group in engine.optimizer.param_groups if group["weight_decay"] == 0 for name in group["names"]}
    decayed = {name for group in engine.optimizer.param_groups if group["weight_decay"] > 0 for name in group["names"]}
    assert all("norm" in name or "router.noise" in name for name in spared)
    assert not any("norm" in name or "router.noise" in name for name in decayed)


def test_flops_are_those_of_active_parameters(tmp_path: Path) -> None:
    method, engine, _ = assembled(tmp_path)
    active = 55_936  # 92,800 less three quarters of the experts' 49,152
    assert method.flops_per_token(engine.model) == 6 * active + 12 * 2 * 64 * 64


def test_utilisation_is_of_the_peak_of_the_device_where_it_is_looked_up(tmp_path: Path) -> None:
    method, engine, loader = assembled(tmp_path, flops_per_device="auto")
    per_token = method.flops_per_token(engine.model)
    for _ in range(2):
        engine.accumulate(method, next(loader), 1)
    values, peak = method.measured(), peak_flops(torch.device("cpu"), "fp32")
    assert peak is not None
    assert values["speed/mfu"] == pytest.approx(values["speed/tokens_per_gpu_second"] * per_token / peak)


@pytest.mark.parametrize("method", ["random", "clustering"])
def test_a_dry_run_leaves_no_folder(method: str, tmp_path: Path) -> None:
    config = build(TrainConfig, {**TINY, "from_dense": method, "budget": "2 steps", "output_dir": tmp_path / "run", "dry_run": True})
    result = run(config, MoeCPT(config))
    assert result["parameters"]["active"] < result["parameters"]["total"]
    assert not (tmp_path / "run").exists()


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_learns_after_its_conversion(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": "smollm2-135m",
        "from_dense": "random",
        "data": ["builtin:python-docs"],
        "max_length": 128,
        "micro_batch_size": 2,
        "budget": "6 steps",
        "warmup": 0.2,
        "lr": 1e-3,
        "eval_every": "1.0",
        "held_out_tokens": 1024,
        "save_every": "never",
        "log_every": 1,
        "tensorboard": False,
        "output_dir": tmp_path / "run",
    }
    config = build(TrainConfig, values | {"eval_every": "0.5"})
    run(config, MoeCPT(config))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["eval/python-docs/loss"] for record in records if "eval/python-docs/loss" in record]
    assert held_out[-1] < held_out[0] - 0.5
    assert (tmp_path / "run" / "init" / "split.safetensors").exists()
