"""A tiny model, method and data for the tests of engines and checkpoints."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_core.config import build
from lm_core.engine import Engine, make_engine
from lm_core.method import Rule
from lm_core.options import RunConfig

CPU = torch.device("cpu")


def options(**changed: Any) -> RunConfig:
    settings = {
        "data": ["synthetic:markov"],
        "model": "tiny",
        "engine": "replicated",
        "lr": 1e-2,
        "weight_decay": 0.1,
        "grad_clip": 0.05,
        "micro_batch_size": 2,
        "accumulate": 4,
    }
    return build(RunConfig, {**settings, **changed})


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 11)
        self.unused = nn.Linear(8, 8)
        self.register_buffer("table", torch.rand(3))
        self.register_buffer("count", torch.randint(9, ()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), y.flatten(), reduction="sum")


class Plain:
    """What engines ask of a method."""

    rules: list[Rule] = []
    fresh_optimizer = False

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.seen = 0

    def engine(self, model: nn.Module, device: torch.device) -> None:
        return None

    def param_rules(self) -> list[Rule]:
        return self.rules

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=1e-2)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def tiny(method: type[Plain] = Plain, start: int = 0, **changed: Any) -> Engine:
    """An engine around the tiny model; weights and buffers depend on `start` alone."""
    torch.manual_seed(start)
    config = options(**changed)
    return make_engine(config, method(config), Tiny(), CPU)


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 11, (2, 6), generator=generator), torch.randint(0, 11, (2, 6), generator=generator)


def run(engine: Engine, steps: int = 3, first: int = 0) -> list[tuple[float, float | None]]:
    """Losses and norms of a few steps over four batches each, dealt out to the data ranks."""
    reports = []
    for step in range(first, first + steps):
        engine.start(1e-2 * (1 - 0.1 * step))
        total = torch.zeros(())
        for k in range(engine.data_rank, 4, engine.data_world):
            with engine.autocast():
                loss = engine.model(*batch(10 * step + k))
            engine.backward(loss / 48)
            total += loss.detach()
        norm = engine.step()
        if engine.data_world > 1:
            torch.distributed.all_reduce(total)
        reports.append((round(float(total) / 48, 5), None if norm is None else round(norm, 5)))
    return reports


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.full_weights()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Counted:
    """A loader's state, and nothing else of it."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int], allow: Collection[str] = ()) -> None:
        self.position = state["position"]
