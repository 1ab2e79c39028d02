"""Options of the commands beside `train`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lm_core.config import Count, change, config, opt
from lm_core.options import DataOptions


@config
class EvalConfig(DataOptions):
    """Held-out loss of a checkpoint. Data options that are not given are those of its run."""

    checkpoint: Path = opt(help="Run folder (its newest checkpoint counts) or checkpoint folder.")
    eval_tokens: Count = opt(10_000_000, "Held-out tokens per source; 0 uses all.", ge=0)
    micro_batch_size: int = opt(8, "Samples in one forward pass.", ge=1, flags=("-b", "--batch_size"))
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "Device to evaluate on.")
    # the spellings of train
    data: list[str] = change(DataOptions, "data", flags=("--dataset", "--train_files"))
    eval_data: list[str] = change(DataOptions, "eval_data", flags=("--validation_files",))
    packing: Literal["document", "stream", "best-fit", "false", "true"] = change(  # type: ignore[assignment]
        DataOptions, "packing", help="How documents share a sample; false is document, true is stream."
    )


@config
class ExportConfig:
    """A checkpoint as a folder that transformers, or peft, loads."""

    checkpoint: Path = opt(help="Run folder (its newest checkpoint counts) or checkpoint folder.")
    out: Path = opt(help="Folder to write; it must not exist yet.", flags=("-o",))
    merge: bool = opt(False, "Add adapters to the weights instead of writing them alone.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = opt("auto", "Type of the written weights; auto keeps that of the training.")


@config
class InspectConfig:
    """The optimizer state in a checkpoint."""

    checkpoint: Path = opt(help="Run folder (its newest checkpoint counts) or checkpoint folder.")


@config
class CompareConfig:
    """Loss, memory and speed of several runs."""

    out: Path | None = opt(None, "CSV file to write the table to.", flags=("-o",))
    picture: Path | None = opt(None, "PNG file: loss against steps, time and memory.")


@config
class BenchConfig:
    """Speed and memory beside their targets."""

    suite: Literal["cpu", "cuda"] = opt("cpu", "Measurements of the CPU, or those of a GPU.")
    only: list[str] = opt(help="Measurements of the suite to make, for example C1 C4; default: all.", factory=list)
    threads: int = opt(1, "Threads of the tensor operations.", ge=1)
    repeats: int = opt(20, "Timed repetitions of short steps.", ge=3)


@config
class PresetsConfig:
    """Model sizes and shipped presets."""
