"""Fine-tuning a classifier of texts: GLUE tasks, or local files of their form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from lm_core import dist
from lm_core.method import IGNORE, Batch, Loss
from lm_core.models import load_classifier
from lm_core.sinks import read
from lowrank_opt import examples
from lowrank_opt.config import TrainConfig
from lowrank_opt.method import LowRank
from lowrank_opt.scores import scored
from lowrank_opt.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_core.data import Data


class Classifier(LowRank):
    """Cross entropy of one label per text, or squared error of one number."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        # predicted and true values of the evaluation that is under way, of this process
        self.pairs: list[tuple[float, float]] = []

    def read(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        return examples.build(self.config, tokenizer)

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        config = self.config
        labels = config.num_labels or TASKS[config.task].labels
        model = load_classifier(**self.source(), num_labels=labels, seed=config.seed, dtype=dtype)
        if hasattr(model, "score") and torch.get_default_device().type != "meta":
            # decoders classify by the last token that is no padding, so they must know what padding is; in encoders
            # the id decides where positions begin
            model.config.pad_token_id = examples.pad_id(self.tokenizer())
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        logits_BC = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        labels_B = batch["labels"]
        real = labels_B != IGNORE
        if logits_BC.shape[1] == 1:
            predicted_B = logits_BC[:, 0]
            total = ((predicted_B - labels_B.float()).square() * real).sum()
        else:
            predicted_B = logits_BC.argmax(1)
            total = F.cross_entropy(logits_BC, labels_B.long(), ignore_index=IGNORE, reduction="sum")
        if not model.training:
            self.pairs += zip(predicted_B[real].tolist(), labels_B[real].tolist())
        yield Loss(total=total)

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        everywhere: list[list[tuple[float, float]]] = dist.gather_objects(self.pairs)
        self.pairs = []
        return {**means, **scored(TASKS[self.config.task].scores, [pair for part in everywhere for pair in part])}

    def flops_per_token(self, model: nn.Module) -> float:
        """Products with the matrices outside the embeddings: forward, back to the inputs, and to the weights that are trained."""
        tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1 and id(parameter) not in tables]
        return float(sum(parameter.numel() * (6 if parameter.requires_grad else 4) for parameter in matrices))


def summary(folder: Path, task: str) -> dict[str, Any]:
    """Scores of the best epoch, by the first score of the task on the first held-out source, and of the last one."""
    score = f"/{TASKS[task].scores[0]}"
    records = [record for record in read(folder / "metrics.jsonl") if record["step"] > 0 and any(name.endswith(score) for name in record)]
    if not records:
        return {}
    name = next(name for name in records[0] if name.endswith(score))
    best = max(records, key=lambda record: record[name])
    chosen = {
        which: {key: record[key] for key in record if key == "epoch" or "eval/" in key}
        for which, record in (("best", best), ("last", records[-1]))
    }
    for which, values in chosen.items():
        print(
            f"{which} epoch {values['epoch']:.2f}  "
            + "  ".join(f"{key[5:]} {value:.4f}" for key, value in values.items() if "eval/" in key)
        )
    return json.loads(json.dumps(chosen))  # type: ignore[no-any-return]
