"""One and the same `train_step` gives equal losses and gradient norms in every engine."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_core import dist
from lm_core.engine import make_engine
from lm_core.method import IGNORE, Batch, Loss, Method, Rule
from lm_core.testing import spawn
from lm_core.train import train_step
from tests.core.engine_cases import CPU, options

ROWS, LENGTH, VOCABULARY = 8, 10, 61


def llama(tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=LENGTH, tie_word_embeddings=tied, use_cache=False))


class DirectHead(nn.Module):
    """Reads the head's weight inside the root's forward, as fused losses do, never calling the head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.model = llama(tied)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=input_ids).last_hidden_state
        logits = F.linear(hidden[:, :-1], self.model.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


class Case(Method):
    def __init__(self, config: Any, model: str) -> None:
        super().__init__(config)
        self.name = model

    def build(self) -> nn.Module:
        if self.name == "causal-loss":
            from lm_core.models import CausalLoss

            return CausalLoss(llama(tied=True))
        return DirectHead(tied=self.name == "tied")

    def param_rules(self) -> list[Rule]:
        return [Rule(r"embed_tokens|layers\.0\.mlp", trained=False)] if self.name == "frozen" else []

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        # several backwards per micro-batch, with unequal numbers of targets
        for part in (slice(0, 6), slice(6, None)):
            yield Loss(total=model(input_ids=batch["input_ids"], labels=outside(batch["labels"], part)))


def outside(labels: Tensor, part: slice) -> Tensor:
    kept = torch.full_like(labels, IGNORE)
    kept[:, part] = labels[:, part]
    return kept


def share(step: int, accumulate: int) -> list[Batch]:
    """This rank's micro-batches of a global batch: row n goes to rank n mod world, and rows differ in their targets."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, 0] = IGNORE
    for row in range(ROWS):
        labels[row, LENGTH - row :] = IGNORE
    mine = torch.arange(dist.rank(), ROWS, dist.world())
    return [Batch({"input_ids": ids[rows], "labels": labels[rows]}, index=rows + step * ROWS, step=step) for rows in mine.chunk(accumulate)]


def losses_and_norms(model: str = "tied", accumulate: int = 1, **changed: Any) -> list[tuple[float, float]]:
    config = options(grad_clip=0.5, micro_batch_size=ROWS // dist.world() // accumulate, accumulate=accumulate, **changed)
    method = Case(config, model)
    engine = make_engine(config, method, method.build(), CPU)
    reports = [train_step(engine, method, share(step, accumulate), lr=1e-2) for step in range(3)]
    return [(report.loss, report.grad_norm) for report in reports]


ENGINES: list[dict[str, Any]] = [
    {"engine": "replicated"},
    {"engine": "sharded"},
    {"engine": "deepspeed", "zero_stage": 1},
    {"engine": "deepspeed", "zero_stage": 2},
    {"engine": "deepspeed", "zero_stage": 3},
    {"engine": "deepspeed", "zero_stage": 2, "offload": "optimizer"},
    {"engine": "deepspeed", "zero_stage": 3, "offload": "all"},
]
CASES = [
    *({"model": "tied", "accumulate": 2, **engine} for engine in ENGINES),
    *({"model": "tied", "accumulate": 1, **engine} for engine in ENGINES[:5]),
    *({"model": model, **engine} for engine in (ENGINES[1], ENGINES[4]) for model in ("untied", "causal-loss", "frozen")),
]
LOW_PRECISION = [
    *({"model": "tied", "accumulate": 2, "precision": "bf16", **engine} for engine in ENGINES[:5]),
    *({"model": "tied", "accumulate": 2, "precision": "fp16", **engine} for engine in ENGINES[:2]),
]


def every_case(cases: list[dict[str, Any]]) -> list[list[tuple[float, float]]]:
    return [losses_and_norms(**case) for case in cases]


@pytest.fixture(scope="module")
def one_process() -> dict[str, list[tuple[float, float]]]:
    return {model: losses_and_norms(model) for model in ("tied", "untied", "causal-loss", "frozen")}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "cases"), [(1, CASES[1:5]), (2, CASES + LOW_PRECISION)], ids=["one", "two"])
def test_every_engine_equals_one_process(world: int, cases: list[dict[str, Any]], one_process: Any) -> None:
    reports = spawn(every_case, cases, world=world)
    assert all(rank == reports[0] for rank in reports), "ranks disagree"
    for case, found in zip(cases, reports[0], strict=True):
        # five digits, or those that 8 bits of mantissa leave
        tolerance = {"abs": 5e-6} if "precision" not in case else {"rel": 5e-2}
        for (loss, norm), (expected_loss, expected_norm) in zip(found, one_process[case["model"]], strict=True):
            assert loss == pytest.approx(expected_loss, **tolerance), case
            assert norm == pytest.approx(expected_norm, **tolerance), case
