"""Options of the commands beside `train`. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lm_core.config import Count, change, config, opt
from lm_core.errors import ConfigError
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
    qa: Path | None = opt(None, "File of prompts and answers (.jsonl), which both decode; the report says how many are right.")
    prompts: int = opt(8, "Beginnings of held-out rows that both continue.", ge=0)
    prompt_tokens: int = opt(32, "Tokens of each beginning.", ge=1)
    max_new_tokens: int = opt(32, "Greedy tokens of each continuation.", ge=1)
    seed: int = opt(42, "Address of all randomness; the one of the run, where the teacher is tiny.", ge=0)


@config
class GenerateConfig:
    """Text from a student, with memory that does not grow."""

    model: str = opt(help="Student: a final/ folder, an exported one, or a checkpoint.")
    prompt: str = opt("", "Text to continue; none begins with the tokenizer's first token.")
    chat: Path | None = opt(None, "JSON file of turns (role and content) to answer, instead of --prompt.")
    state_in: Path | None = opt(None, "File of --state-out: go on behind that text.")
    state_out: Path | None = opt(None, "File to keep what the student remembers of the text in.")
    max_new_tokens: int = opt(128, "Longest continuation.", ge=1)
    temperature: float = opt(0.0, "0 takes the likeliest token; above 0 tokens are drawn.", ge=0)
    top_p: float = opt(1.0, "Draw from the fewest tokens that hold this share of the mass.", gt=0, le=1)
    top_k: int = opt(0, "Draw from so many likeliest tokens; 0 takes all.", ge=0)
    repetition_penalty: float = opt(1.0, "Makes tokens that have occurred so many times less likely.", gt=0)
    seed: int = opt(42, "Seed of drawn tokens.", ge=0)
    stream: bool = opt(False, "Print tokens as they are found.")

    def check(self) -> None:
        if self.chat is not None and self.prompt:
            raise ConfigError("chat: a chat is answered and a --prompt is continued; give one of them")


@config
class BenchConfig:
    """Ratios that the package promises, measured on this machine in processor time of one thread."""

    op: Literal["wkv7", "wkv6", "linear_kl", "decode", "stage1", "pack", "all"] = opt("all", "What is measured.")
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


@config
class PrepareConfig:
    """Rows tokenised once, for --preprocessed-data."""

    raw_data: list[str] = opt(help="Rows to read, written like --data of train; repeatable.", factory=list, flags=("-r", "--data"))
    output_dir: Path = opt(help="Folder to write; must not hold anything.", flags=("-o",))
    tokenizer: str = opt(help="Tokenizer: bytes, a folder or a hub id.")
    max_length: int = opt(512, "Tokens of a row at most; longer documents are cut.", flags=("-m",), ge=2)
    format: Literal["hf", "shards", "binidx"] = opt(
        "hf", "hf: a saved dataset, with labels; shards: token shards; binidx: RWKV's .bin and .idx (both for plain text)."
    )
    text_column: str = change(DataOptions, "text_column")
    num_proc: int = opt(1, "Processes that tokenise.", ge=1)


@config
class ConsolidateConfig:
    """A checkpoint of any engine as one file of tensors."""

    output: Path = opt(help="File to write: .safetensors or .bin.", flags=("-o",))

    def check(self) -> None:
        if self.output.suffix not in (".safetensors", ".bin"):
            raise ConfigError(f"output: {self.output} is neither .safetensors nor .bin; use one of these endings")
