"""A whole distillation in small: a teacher that has learned something, and students that learn it from the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lm_core.config import build
from lm_core.data import build_data
from lm_core.data.vocab import byte_tokenizer
from lm_core.engine import make_engine
from lm_core.evaluate import evaluate
from lm_core.models import CausalLoss, load_model
from lm_core.run import make_loader
from lm_core.train import train_step
from rwkv_distill.align import Align, hf_student
from rwkv_distill.config import TrainConfig, rate
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


def distances(teacher: Path, stage: int, steps: int, student: dict[str, Any], weights: Path | None = None, **options: Any) -> list[float]:
    """Held-out divergences (in stage 1: distances) before and after `steps` updates; the student's tensors go to the file `weights`."""
    values = {
        **SHARED, "model": str(teacher), "stage": stage, "budget": f"{max(steps, 1)} steps", "student": {"head_size": 32, **student},
        **({"dropout": 0.0} if stage == 2 else {}), **options,
    }  # fmt: skip
    config = build(TrainConfig, values)
    torch.manual_seed(config.seed)
    method = Align(config) if stage == 1 else Distill(config)
    data = method.data(method.tokenizer())
    engine = make_engine(config, method, method.build(), torch.device("cpu"))
    loader = make_loader(config, data, 0, 1)
    first = 3e-3 if stage == 1 else 1e-3
    found = []
    for step in range(steps + 1):
        if step in (0, steps):
            found.append(evaluate(engine, method, data.valid, micro_batch=8, tokens=2048).mean)
        if step < steps:
            train_step(engine, method, next(loader), lr=rate(step, step / steps, first, 3e-4, 5, "exp"))
    if weights is not None:
        torch.save(hf_student(engine.model).state_dict(), weights)
    return found


@pytest.mark.slow
def test_two_stages_beat_a_random_start_by_far(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    make_teacher(teacher)
    random = distances(teacher, 2, 60, {"init": "random"})
    for preset, limit in (("arwkv", 0.45), ("rad", 0.25)):
        aligned = tmp_path / f"{preset}.bin"
        distances(teacher, 1, 60, {"preset": preset}, aligned)
        found = distances(teacher, 2, 60, {"preset": preset}, ckpt_file=aligned)
        (untrained,) = distances(teacher, 2, 0, {"preset": preset})
        assert found[-1] < limit * random[-1], (preset, found, random)
        assert found[-1] < 0.2 * untrained, (preset, found, untrained)
