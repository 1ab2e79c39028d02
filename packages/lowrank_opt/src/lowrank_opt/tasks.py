"""The classification tasks that have a name: their labels, the columns of the benchmark, and what they are scored by. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """`columns` hold one or two texts. 1 label is a number to predict. The first of `scores` decides which epoch is best."""

    labels: int
    columns: tuple[str, ...]
    scores: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)

    @property
    def plain(self) -> tuple[str, ...]:
        """The column names of local files."""
        return ("sentence",) if len(self.columns) == 1 else ("sentence1", "sentence2")


PAIR = ("sentence1", "sentence2")
TASKS: Mapping[str, Task] = {
    "cola": Task(2, ("sentence",), ("matthews",)),
    "mnli": Task(3, ("premise", "hypothesis"), validation=("validation_matched", "validation_mismatched")),
    "mrpc": Task(2, PAIR, ("accuracy", "f1")),
    "qnli": Task(2, ("question", "sentence")),
    "qqp": Task(2, ("question1", "question2"), ("accuracy", "f1")),
    "rte": Task(2, PAIR),
    "sst2": Task(2, ("sentence",)),
    "stsb": Task(1, PAIR, ("pearson", "spearman")),
    "wnli": Task(2, PAIR),
}
HUB = "nyu-mll/glue"
