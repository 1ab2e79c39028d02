"""Adapters whose first values come from the weights themselves, which they take out of the weights they stand beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_core.config import build
from lm_core.models import load_model, using_peft
from lm_core.run import run
from lowrank_opt import exporting
from lowrank_opt.commands import ExportConfig
from lowrank_opt.config import TrainConfig
from lowrank_opt.method import LowRank
from lowrank_opt.models import PRESETS

INPUTS = torch.arange(40)[None] % 256


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=INPUTS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("word", ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian"])
def test_the_function_is_kept_at_first_and_what_was_trained_is_written(word: str, tmp_path: Path) -> None:
    base = load_model("llama_test", presets=PRESETS, init="random", seed=3)
    base.save_pretrained(tmp_path / "base")
    config = build(
        TrainConfig,
        {
            "mode": "finetuning", "task": "lm", "optimizer": "lora", "model": str(tmp_path / "base"), "tokenizer": "bytes", "lr": 5e-3,
            "data": ["synthetic:markov"], "packing": "stream", "max_length": 64, "micro_batch_size": 2, "precision": "fp32",
            "lora": {"init_lora_weights": word, "r": 4, "lora_dropout": 0.0}, "output_dir": str(tmp_path / "run"), "max_steps": 2,
            "schedule": "constant", "eval_every": "never", "tensorboard": False,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    method = LowRank(config)
    method.data(method.tokenizer())
    module = method.build()
    torch.testing.assert_close(logits(method.hf_model(module)), logits(base), rtol=0, atol=1e-5)

    method = LowRank(config)
    seen: list[torch.nn.Module] = []
    keep = method.build
    method.build = lambda: seen.append(keep()) or seen[0]  # type: ignore[method-assign, func-returns-value]
    run(config, method)
    trained = logits(method.hf_model(seen[0]))
    assert not torch.allclose(trained, logits(base), atol=1e-3)
    final = tmp_path / "run/final"
    if (final / "adapter_config.json").exists():
        assert word in ("orthogonal", "gaussian")
        with using_peft() as peft:
            read = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(final))
    else:
        read = AutoModelForCausalLM.from_pretrained(final)
    torch.testing.assert_close(logits(read), trained, rtol=0, atol=1e-4)
    found = exporting.run(ExportConfig(checkpoint=tmp_path / "run", out=tmp_path / "out", merge=True))
    assert found["largest_logit_difference"] < 1e-5
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), trained, rtol=0, atol=1e-4)
