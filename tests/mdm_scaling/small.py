"""A tiny network and table models that the tests of this package share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mdm_scaling.model import Objective, fresh, load_network
from mdm_scaling.sizes import Shape, shape

VOCABULARY = 50


SHAPE = shape(2, 32, 4, 8)


def network(objective: Objective, *, vocabulary: int = VOCABULARY, seed: int = 0, sizes: Shape = SHAPE, **changes: Any) -> PreTrainedModel:
    options: dict[str, Any] = {
        "tied": True, "positions": 64, "theta": 10000.0, "eps": 1e-5, "std": 0.2, "divisible_by": 8, "restrict_logits": True, "seed": seed,
    }  # fmt: skip
    model = fresh(objective, sizes, vocabulary, **{**options, **changes})
    return model.train(False)


class Table:
    """A fixed predictor: log-probabilities that depend on the whole masked sequence through a random table."""

    def __init__(self, vocabulary: int, size: int, seed: int = 0) -> None:
        self.vocabulary, self.size = vocabulary, size
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn((vocabulary + 1) ** size, size, vocabulary, generator=generator, dtype=torch.float64)

    def logits(self, noisy_BS: Tensor) -> Tensor:
        place = (self.vocabulary + 1) ** torch.arange(self.size)
        return self.table[(noisy_BS * place).sum(1)]

    def __call__(self, noisy_BS: Tensor, targets: Tensor, rows: Tensor, weights: Tensor | None = None, reduction: str = "sum") -> Tensor:
        nll = -self.logits(noisy_BS).flatten(0, 1)[rows].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        nll = nll if weights is None else nll * weights
        return nll.sum() if reduction == "sum" else nll


def class_elsewhere(folder: Path, scratch: Path) -> str:
    """The class that transformers gives the model in `folder` where this package cannot be imported, once its logits equal ours bit for bit."""
    tokens = torch.arange(10)[None]
    torch.save(load_network(str(folder))(input_ids=tokens).logits.detach(), scratch / "logits.pt")
    code = (
        "import sys, torch; sys.modules['mdm_scaling'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"assert torch.equal(model(input_ids=torch.arange(10)[None]).logits, torch.load({str(scratch / 'logits.pt')!r}))\n"
        "print(type(model).__name__)"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()
