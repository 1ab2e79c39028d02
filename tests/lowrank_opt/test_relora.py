"""Adapters that are merged into the weights on the way, and begin again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm_core.config import build
from lm_core.run import run
from lowrank_opt import exporting, relora
from lowrank_opt.adamw import AdamW
from lowrank_opt.commands import ExportConfig
from lowrank_opt.config import TrainConfig
from lowrank_opt.method import LowRank

EVERY, WARMUP = 3, 2


def options(folder: Path, **values: Any) -> TrainConfig:
    return build(TrainConfig, {
        "mode": "finetuning", "task": "lm", "optimizer": "lora", "model": "llama_test", "tokenizer": "bytes", "data": ["synthetic:markov"],
        "packing": "stream", "max_length": 64, "micro_batch_size": 2, "precision": "fp32", "schedule": "constant", "lr": 5e-3,
        "output_dir": str(folder), "save_every": "2", "eval_every": "never", "tensorboard": False, "max_steps": 8, "log_every": 1,
        "lora": {"r": 4, "relora_every": EVERY, "relora_warmup": WARMUP}, **values,
    })  # fmt: skip


@pytest.mark.parametrize("model", ["llama_test", "gpt2_test"])
def test_a_restart_keeps_the_function_and_a_hundredth_of_the_moments(tmp_path: Path, model: str) -> None:
    torch.manual_seed(0)
    method = LowRank(options(tmp_path, model=model))
    module = method.build()
    adapters = [p for name, p in module.named_parameters() if "lora_" in name]
    optimizer = AdamW(adapters, lr=1e-2)
    relora.attach(optimizer, module, every=2, seed=0)
    inputs = torch.arange(40)[None] % 256
    inner = method.hf_model(module).eval()
    for step in (1, 2):
        for p in adapters:
            p.grad = torch.randn_like(p)
        if step == 2:
            # what the weights are behind this update, were it an ordinary one
            alone = {p: p.detach().clone() for p in adapters}
            other = AdamW(list(alone.values()), lr=1e-2)
            other.load_state_dict(optimizer.state_dict())
            for p, copied in alone.items():
                copied.grad = p.grad
            other.step()
        optimizer.step()
    after = inner(input_ids=inputs).logits.detach()
    assert all(bool((p == 0).all()) for name, p in module.named_parameters() if "lora_B" in name)
    for p in adapters:
        for name in ("exp_avg", "exp_avg_sq"):
            assert int((optimizer.state[p][name] != 0).sum()) == max(1, round(0.01 * p.numel()))
    # the same function from the old weights with the old adapters
    for part in [part for part in module.modules() if hasattr(part, "get_delta_weight")]:
        a, b = (part.lora_A["default"].weight, part.lora_B["default"].weight)
        merged = part.scaling["default"] * (alone[b] @ alone[a])
        part.get_base_layer().weight.data -= merged.t() if part.fan_in_fan_out else merged
        a.data, b.data = alone[a].data, alone[b].data
    torch.testing.assert_close(inner(input_ids=inputs).logits, after, rtol=0, atol=1e-5)


def test_a_resumed_run_is_exact_across_a_restart_and_its_export_is_the_trained_model(tmp_path: Path) -> None:
    whole = options(tmp_path / "whole")
    run(whole, LowRank(whole))
    for steps in (EVERY, 4, 8):
        config = options(tmp_path / "parts", max_steps=steps, resume="auto")
        run(config, LowRank(config))
    first, second = (load_file(tmp_path / name / "checkpoints/checkpoint-8/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    rates = [json.loads(line).get("optim/lr") for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    peak = 5e-3
    assert [rate for rate in rates if rate is not None] == pytest.approx([peak] * 3 + [peak / 2, peak, peak] * 1 + [peak / 2, peak])
    exporting.run(ExportConfig(checkpoint=tmp_path / "whole", out=tmp_path / "out"))
    final, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole/final", "out"))
    inputs = torch.arange(40)[None] % 256
    with torch.no_grad():
        torch.testing.assert_close(final(input_ids=inputs).logits, again(input_ids=inputs).logits, rtol=0, atol=1e-6)
