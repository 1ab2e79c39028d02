"""Options of the commands that measure models, look at runs and check scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lm_core.config import Count, config, opt


@config
class InspectConfig:
    """Parameters of a mixture, and how its routers choose on a text."""

    model: str = opt(help="Mixture written by moe-cpt convert or train.")
    data: list[str] = opt(help="Text to route, written like --data of train; without it only parameters are counted.", factory=list)
    text_column: str = opt("text", "Column or key that holds the text.")
    max_length: int = opt(512, "Tokens per sample.", ge=2, flags=("--block_size",))
    max_tokens: Count = opt(8192, "Tokens to route.", ge=1)


@config
class EvalConfig:
    """Held-out loss of a model, by source."""

    model: str = opt(help="Mixture or dense model: a folder, a .gguf file, smollm2-135m or a hub id.", flags=("--model_name_or_path",))
    tokenizer: str | None = opt(
        None, "Tokenizer: bytes, a folder or a hub id; default: the model's own.", flags=("--tokenizer_name_or_path",)
    )
    eval_data: list[str] = opt(
        help="Held-out data, repeatable or a comma list: a folder with one file per source, builtin:python-docs, builtin:stdlib, synthetic:NAME, "
        "a file, a folder or a hub id.",
        flags=("--validation_dir",),
        min_length=1,
    )
    text_column: str = opt("text", "Column or key that holds the text.")
    packing: Literal["stream", "best-fit", "document"] = opt("stream", "How documents share a sample.")
    max_length: int = opt(2048, "Tokens per sample.", ge=2, flags=("--block_size",))
    micro_batch_size: int = opt(8, "Samples in one forward pass.", ge=1, flags=("--per_device_eval_batch_size",))
    eval_tokens: Count = opt(0, "Held-out tokens per source; 0 uses all.", ge=0)
    precision: Literal["fp32", "bf16"] = opt("fp32", "Arithmetic of the forward pass.")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "Device to run on.")


@config
class ReferenceConfig(EvalConfig):
    """Held-out loss by source as the reference of a dynamic data selection."""

    output: Path = opt(help="JSON file to write.", flags=("-o",))
    overwrite: bool = opt(False, "Replace what is at --output.")


@config
class SlurmCheckConfig:
    """What to compare a Slurm script with."""

    max_cpus: int = opt(128, "Most CPUs per task that the cluster has.", ge=1)
    header: Path | None = opt(None, "Log of a run: its first lines must say what the script computes.")
    fix: bool = opt(False, "Make the folders of the logs.")


@config
class SlurmRenderConfig:
    """Machines of a Slurm script."""

    nodes: int = opt(help="Machines.", ge=1)
    gpus: int = opt(help="GPUs of each machine.", ge=1)
    output: Path = opt(help="Script to write, for scripts of this repository beside the original.", flags=("-o",))
    overwrite: bool = opt(False, "Replace what is at --output.")


@config
class ReportConfig:
    """Where to write pictures of runs."""

    output: Path = opt(help="Folder for the pictures and the table.", flags=("-o",))


@config
class TensorBoardConfig:
    """Where to show runs."""

    port: int = opt(8001, "Port of the page.", ge=1, le=65535)
    run: bool = opt(False, "Start TensorBoard instead of printing its command.")


@config
class BenchConfig:
    """Speed, memory and quality beside their targets."""

    only: list[str] = opt(help="Measurements to make: layer, data, split, construction, train; default: all.", factory=list)
    threads: int = opt(1, "Threads of the tensor operations.", ge=1)
    repeats: int = opt(8, "Timed repetitions; the least of them counts.", ge=3)
