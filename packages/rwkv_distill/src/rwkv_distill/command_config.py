"""Options of the commands beside `train`. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lm_core.config import Count, change, config, opt
from lm_core.options import DataOptions, EngineOptions


@config
class EvalConfig(DataOptions):
    """A student beside its teacher."""

    model: str = opt(help="Student: a final/ folder, an exported one, or a checkpoint.")
    teacher: str = opt(help="Teacher: tiny, smollm2-135m, a folder, a .gguf file or a hub id.")
    packing: Literal["document", "best-fit", "stream"] = change(DataOptions, "packing", default="document")
    max_length: int = change(DataOptions, "max_length", flags=("-m",))
    data: list[str] = change(DataOptions, "data", flags=("-r",))
    eval_tokens: Count = opt(10_000, "Held-out tokens per source; 0 uses all.", ge=0)
    micro_batch_size: int = change(EngineOptions, "micro_batch_size", default=1, flags=("-b",))
    prompts: int = opt(8, "Beginnings of held-out rows that both continue.", ge=0)
    prompt_tokens: int = opt(32, "Tokens of each beginning.", ge=1)
    max_new_tokens: int = opt(32, "Greedy tokens of each continuation.", ge=1)
    seed: int = opt(42, "Address of all randomness; the one of the run, where the teacher is tiny.", ge=0)


@config
class GenerateConfig:
    """Text from a student, with memory that does not grow."""

    model: str = opt(help="Student: a final/ folder, an exported one, or a checkpoint.")
    prompt: str = opt("", "Text to continue; none begins with the tokenizer's first token.")
    max_new_tokens: int = opt(128, "Longest continuation.", ge=1)
    temperature: float = opt(0.0, "0 takes the likeliest token; above 0 tokens are drawn.", ge=0)
    top_p: float = opt(1.0, "Draw from the fewest tokens that hold this share of the mass.", gt=0, le=1)
    top_k: int = opt(0, "Draw from so many likeliest tokens; 0 takes all.", ge=0)
    repetition_penalty: float = opt(1.0, "Makes tokens that have occurred so many times less likely.", gt=0)
    seed: int = opt(42, "Seed of drawn tokens.", ge=0)
    stream: bool = opt(False, "Print tokens as they are found.")


@config
class BenchConfig:
    """Ratios that the package promises, measured on this machine in processor time of one thread."""

    op: Literal["wkv7", "decode", "stage1", "pack", "all"] = opt("all", "What is measured.")
    repeats: int = opt(10, "Calls of which the fastest counts.", ge=1)
    model: str | None = opt(None, "Student whose decoding is measured; default: a tiny one of random weights.")
    teacher: str | None = opt(None, "Transformer whose decoding is measured beside it.")
    context: int = opt(8192, "Longest context of decoding.", ge=64)
    tokens: int = opt(16, "Tokens decoded behind each context.", ge=1)
    output: Path | None = opt(None, "File for the report, as JSON.", flags=("-o",))
    figure: Path | None = opt(None, "File for a picture of decoding: time and memory against context (PNG).")


@config
class ExportConfig:
    """A student in the layouts of others."""

    ckpt: Path = opt(help="Student: a run folder, its final/ folder or one of its checkpoints.")
    output_dir: Path = opt(help="Folder to write; must not hold anything.", flags=("-o",))
    format: Literal["hf", "arwkv", "pth"] = opt(
        "hf", "hf: a folder with its modelling code; arwkv: the layout that llama.cpp converts; pth: the mixers, named as in RWKV-LM."
    )
    dtype: Literal["bf16", "fp16", "fp32"] = opt("bf16", "Type of the weights.")
    shard_size: str = opt("5GB", "Largest file of weights (hf).")


@config
class ImportConfig:
    """An exported folder as a student that can be trained on."""

    format: Literal["arwkv", "hf"] = opt("arwkv", "Layout of the folder.")
    output_dir: Path = opt(help="Folder to write; must not hold anything.", flags=("-o",))
