"""A whole distillation in small: a teacher that has learned something, and students that learn it from the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_core.config import build
from lm_core.data import build_data
from lm_core.data.vocab import byte_tokenizer
from lm_core.models import CausalLoss, load_model
from lm_core.run import make_loader, run
from rwkv_distill.align import Align
from rwkv_distill.config import TrainConfig
from rwkv_distill.distill import Distill

SHAPE = {
    "model_type": "llama", "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
SHARED: dict[str, Any] = {
    "data": ["builtin:python-docs"], "packing": "stream", "max_length": 64, "micro_batch_size": 8, "accumulate": 1, "stop_loss": 0,
    "eval_tokens": 4096, "tensorboard": False, "device": "cpu", "gradient_checkpointing": False, "save_every": "never", "warmup": 5,
}  # fmt: skip


def make_teacher(folder: Path, steps: int = 250) -> None:
    """A byte-level model after a short training on built-in text."""
    config = build(TrainConfig, {**SHARED, "model": "tiny"})
    model = load_model("toy", presets={"toy": SHAPE})
    loader = make_loader(config, build_data(config, byte_tokenizer()), 0, 1)
    module, optimizer = CausalLoss(model), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        (batch,) = next(loader)
        loss = module(batch["input_ids"], batch["labels"]) / batch["labels"].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def divergences(folder: Path, teacher: Path, stage: int, steps: int, student: dict[str, Any], **options: Any) -> list[float]:
    """Held-out divergences (in stage 1: distances) before and after a run."""
    values = {
        **SHARED, "model": str(teacher), "stage": stage, "budget": f"{steps} steps", "eval_every": "0.99", "output_dir": folder,
        "student": {"head_size": 32, **student}, "lr": 3e-3 if stage == 1 else 1e-3, "lr_final": 3e-4, **options,
    }  # fmt: skip
    if stage == 2:
        values["dropout"] = 0.0
    config = build(TrainConfig, values)
    run(config, Align(config) if stage == 1 else Distill(config))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["eval/python-docs/loss"] for record in records if "eval/python-docs/loss" in record]


@pytest.mark.slow
def test_two_stages_beat_a_random_start_by_far(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher")
    random = divergences(tmp_path / "random", tmp_path / "teacher", 2, 80, {"init": "random"})
    for preset, limit in (("arwkv", 0.45), ("rad", 0.25)):
        divergences(tmp_path / f"{preset}1", tmp_path / "teacher", 1, 80, {"preset": preset})
        found = divergences(tmp_path / f"{preset}2", tmp_path / "teacher", 2, 80, {"preset": preset}, ckpt_file=tmp_path / f"{preset}1")
        untrained = divergences(tmp_path / f"{preset}0", tmp_path / "teacher", 2, 1, {"preset": preset})[0]
        assert found[-1] < limit * random[-1], (preset, found, random)
        assert found[-1] < 0.2 * untrained, (preset, found, untrained)
