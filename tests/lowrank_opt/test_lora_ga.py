"""Adapters that begin along the gradient of the weights, against a float64 SVD of that gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lm_core.config import build
from lm_core.models import load_model
from lm_core.run import run
from lowrank_opt import exporting, lora_ga
from lowrank_opt.commands import ExportConfig
from lowrank_opt.config import TrainConfig
from lowrank_opt.method import LowRank, method_for
from lowrank_opt.models import PRESETS

RANK, BATCHES = 4, 3


def options(folder: Path, **values: Any) -> TrainConfig:
    lora = {"init_lora_weights": "lora_ga", "lora_ga_batches": BATCHES, "r": RANK, "lora_dropout": 0.0, **values.pop("lora", {})}
    given = {
        "mode": "finetuning", "task": "lm", "optimizer": "lora", "model": "llama_test", "tokenizer": "bytes", "data": ["synthetic:markov"],
        "packing": "stream", "max_length": 64, "micro_batch_size": 2, "precision": "fp32", "schedule": "constant", "lr": 5e-3, "init": "random",
        "output_dir": str(folder), "save_every": "2", "eval_every": "never", "tensorboard": False, "max_steps": 4, **values,
    }  # fmt: skip
    return build(TrainConfig, {**given, "lora": lora})


def started(config: TrainConfig) -> tuple[LowRank, nn.Module]:
    """The method and its model as a run begins."""
    torch.manual_seed(config.seed)
    method = LowRank(config)
    method.data(method.tokenizer())
    return method, method.build()


def test_adapters_follow_the_svd_of_the_gradient_and_keep_the_function(tmp_path: Path) -> None:
    config = options(tmp_path)
    method, module = started(config)
    plain = load_model("llama_test", presets=PRESETS, init="random", seed=config.seed)
    inputs = torch.arange(40)[None] % 256
    with torch.no_grad():
        ours, before = (part.eval()(input_ids=inputs).logits for part in (method.hf_model(module), plain))
    torch.testing.assert_close(ours, before, rtol=0, atol=1e-5)
    # the gradient of the same batches, in float64 and of the model without adapters
    assert method.rows is not None
    double = plain.double()
    targets = 0
    for _, batch in zip(range(BATCHES), lora_ga.batches(method, method.rows), strict=False):
        logits = double(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        labels = batch["labels"][:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum").backward()
        targets += int((batch["labels"] != -100).sum())
    parts = {name: part for name, part in module.named_modules() if hasattr(part, "lora_ga_init")}
    assert len(parts) == 4
    for name, part in parts.items():
        weight = double.get_parameter(name.partition("model.base_model.model.")[2] + ".weight")
        u_mm, s_m, v_mn = torch.linalg.svd(weight.grad / targets)
        a_rn, b_mr = part.lora_A["default"].weight.double(), part.lora_B["default"].weight.double()
        scale = len(weight) ** 0.25 / 16**0.5
        wanted = v_mn[:RANK].t() @ v_mn[:RANK]
        torch.testing.assert_close(a_rn.t() @ a_rn, wanted, rtol=0, atol=1e-2)
        columns = u_mm[:, RANK : 2 * RANK] * s_m[RANK : 2 * RANK] * scale
        torch.testing.assert_close(b_mr @ b_mr.t(), columns @ columns.t(), rtol=0, atol=1e-2 * float((columns @ columns.t()).abs().max()))
        shifted = part.get_base_layer().weight.double() + part.scaling["default"] * (b_mr @ a_rn)
        torch.testing.assert_close(shifted, weight.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("more", [{}, {"optimizer": "lora+galore8bit", "galore": {"rank": 2}}])
def test_a_resumed_run_is_exact_and_its_export_is_the_trained_model(tmp_path: Path, more: dict[str, Any]) -> None:
    whole = options(tmp_path / "whole", **more)
    run(whole, LowRank(whole))
    for steps in (2, 4):
        config = options(tmp_path / "parts", max_steps=steps, resume="auto", **more)
        run(config, LowRank(config))
    first, second = (load_file(tmp_path / name / "checkpoints/checkpoint-4/model.safetensors") for name in ("whole", "parts"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    found = exporting.run(ExportConfig(checkpoint=tmp_path / "whole", out=tmp_path / "out", merge=True))
    assert found["largest_logit_difference"] < 1e-5
    final, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole/final", "out"))
    inputs = torch.arange(40)[None] % 256
    with torch.no_grad():
        torch.testing.assert_close(final(input_ids=inputs).logits, again(input_ids=inputs).logits, rtol=0, atol=1e-6)


def test_a_classifier_begins_along_its_gradient(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(f'{{"sentence": "text {n} {"good" if n % 2 else "bad"}", "label": {n % 2}}}\n' for n in range(40)))
    config = options(tmp_path / "run", task="sst2", model="roberta_test", data=[str(data)], packing="document")
    method = method_for(config)
    method.data(method.tokenizer())
    module = method.build()
    assert all(bool(part.lora_B["default"].weight.any()) for part in module.modules() if hasattr(part, "lora_ga_init"))
