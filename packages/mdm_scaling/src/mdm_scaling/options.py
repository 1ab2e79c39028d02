"""Options of the commands that use corpora and models. Free of torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from lm_core.config import Count, config, opt
from lm_core.errors import ConfigError
from mdm_scaling import sizes


@config
class TokenizeConfig:
    """Text to tokens in Megatron's format."""

    input: str = opt(help="Text: a data argument, such as corpus.jsonl.gz or builtin:python-docs.")
    output_prefix: Path = opt(help="Files are called <prefix>_text_document.bin and .idx.")
    tokenizer: str = opt(help="bytes, smollm2-135m, a folder or a hub id.")
    append_eod: bool = opt(True, "End every document with the tokenizer's end token.")
    workers: int = opt(1, "Processes that tokenise.", ge=1)
    text_column: str = opt("text", "Column or key that holds the text.", flags=("--json-key",))
    skip_bad_lines: bool = opt(
        False, "Leave out, and count, lines of a .jsonl file that hold no text; else the first one ends the command."
    )
    overwrite: bool = opt(False, "Replace files that are there.")


@config
class VerifyConfig:
    """Check a corpus in Megatron's format."""

    vocabulary: int | None = opt(None, "Entries of the tokenizer; default: tokens are only checked for being above 0.", ge=1)


@config
class ConcatConfig:
    """Join corpora in Megatron's format."""

    output_prefix: Path = opt(help="Prefix of the files to write.")
    overwrite: bool = opt(False, "Replace files that are there.")


@config
class SubsetConfig:
    """The first documents of a text file."""

    tokens: Count = opt(help="Tokens to take, as 100M; by the mean length of a document.", ge=1)
    tokens_per_doc: str = opt("c4", "Mean tokens of a document: c4, slimpajama, oscar or a number.")
    exact: bool = opt(False, "Count the tokens of every document, and end with the one that reaches --tokens.")
    tokenizer: str | None = opt(None, "Tokenizer that counts: bytes, smollm2-135m, a folder or a hub id; only with --exact.")
    text_column: str = opt("text", "Key that holds the text; only with --exact.", flags=("--json-key",))
    out: Path = opt(help="File to write (.jsonl).")
    overwrite: bool = opt(False, "Replace what is there.")

    def check(self) -> None:
        if self.exact != (self.tokenizer is not None):
            raise ConfigError("exact: counts with --tokenizer; give both, or neither")


@config
class EvalConfig:
    """The likelihood of a corpus under a model."""

    checkpoint: str = opt(help="Model: a run folder, a model folder, smollm2-135m or a hub id.", flags=("--model",))
    data: list[str] = opt(help="Data to score, repeatable; of built-in data the held-out part.", flags=("--data-path",), min_length=1)
    text_column: str = opt("text", "Column or key that holds the text.", flags=("--json-key",))
    objective: Literal["ar", "mdm"] | None = opt(
        None, "What the model was trained for; default: what its folder says, ar for a plain Llama."
    )
    estimator: Literal["stratified", "shift", "iid", "fixed-count", "exact", "chain"] = opt(
        "stratified", "How the bound of a masked model is estimated; exact takes at most 14 positions."
    )
    num_mc: int = opt(32, "Draws of the noise per sequence.", ge=1)
    mask_eps: float = opt(1e-3, "Smallest chance to mask a token.", gt=0, lt=1)
    eval_seed: int = opt(4321, "Address of the noise.", ge=0)
    max_length: int = opt(512, "Tokens per sequence.", flags=("--seq-length",), ge=2)
    limit: int | None = opt(None, "Score only the first so many sequences.", ge=1)
    micro_batch_size: int = opt(8, "Sequences in one forward pass.", ge=1)

    def check(self) -> None:
        if self.estimator == "exact" and self.max_length > 14:
            raise ConfigError(f"estimator: exact runs 2^S forward passes, too many for S = {self.max_length}; use --seq-length 14 or less")


@config
class TasksConfig:
    """Multiple-choice and cloze tasks."""

    checkpoint: str = opt(help="Model: a run folder, a model folder, smollm2-135m or a hub id.", flags=("--model",))
    tasks: str = opt(help="JSONL file of {context, choices, answer} or {context, target}; or, with lm-eval, names of its tasks: A,B.")
    method: Literal["mc", "chain", "greedy"] | None = opt(
        None,
        "Bound by draws, left-to-right likelihood, or whether the likeliest text is the target; default: mc for a masked model, else chain.",
    )
    only_generate: bool = opt(False, "The same as --method greedy.")
    only_mc_nll: bool = opt(False, "Print the bound alone, by --method mc.")
    num_mc: int = opt(32, "Draws of the noise per target.", ge=1)
    max_chunk_size: int = opt(32, "Sequences in one forward pass, among them the masked versions of one.", ge=1)
    batch_size: str = opt("auto", "Targets that are scored together; auto: as many as one forward pass holds.")
    eval_seed: int = opt(4321, "Address of the noise.", ge=0)
    limit: int | None = opt(None, "Only the first so many items.", ge=1)

    def check(self) -> None:
        for name, method in (("only_generate", "greedy"), ("only_mc_nll", "mc")):
            if getattr(self, name) and self.method not in (None, method):
                raise ConfigError(f"{name}: means --method {method}, but {self.method} is given; drop one of the two")
        if self.batch_size != "auto" and not re.fullmatch(r"0*[1-9]\d{0,8}", self.batch_size):
            raise ConfigError(f"batch_size: {self.batch_size!r} is no number of targets; use auto, or 1 or more")
        if self.only_generate and self.only_mc_nll:
            raise ConfigError("only_generate: --only-mc-nll is given, too; drop one of the two")

    @property
    def how(self) -> Literal["mc", "chain", "greedy"] | None:
        """The method by whichever option names it."""
        return "greedy" if self.only_generate else "mc" if self.only_mc_nll else self.method


@config
class ExportConfig:
    """A model as a Hugging Face folder."""

    checkpoint: str = opt(help="Model: a run folder, a model folder, smollm2-135m or a hub id.", flags=("--model",))
    format: Literal["hf"] = opt("hf", "Hugging Face folder.")
    out: Path = opt(help="Folder to write.", flags=("-o",))
    overwrite: bool = opt(False, "Replace what is there.")


@config
class ImportConfig:
    """A model of another source, made ready for one objective."""

    objective: Literal["ar", "mdm"] = opt(help="What the model shall be trained for.")
    out: Path = opt(help="Folder to write.", flags=("-o",))
    overwrite: bool = opt(False, "Replace what is there.")
    init_std: float = opt(0.02, "Standard deviation of new rows of the embedding.", gt=0)
    make_vocab_size_divisible_by: int = opt(sizes.DIVISIBLE_BY, "Rows of the embedding are rounded up to a multiple of this.", ge=1)
    seed: int = opt(1234, "Address of the new rows.", ge=0)


@config
class GenerateConfig:
    """Text from a model."""

    checkpoint: str = opt(help="Model: a run folder, a model folder, smollm2-135m or a hub id.", flags=("--model",))
    prompt: list[str] = opt(help="Text to continue, repeatable; [MASK] stands for one token that a masked model fills.", factory=list)
    prompts_file: Path | None = opt(None, "File with one prompt per line.")
    num_samples: int = opt(1, "Continuations of each prompt.", ge=1)
    max_new_tokens: int = opt(128, "Tokens to write behind each prompt.", ge=0)
    sampler: Literal["ancestral", "first-hitting", "confidence", "ar"] | None = opt(
        None, "How tokens are chosen; default: confidence for a masked model, ar for an autoregressive one."
    )
    steps: int = opt(128, "Steps of a masked model.", ge=1)
    block_length: int | None = opt(None, "Masks that are filled together, blocks from left to right; default: all.", ge=1)
    remasking: Literal["low-confidence", "random", "margin", "entropy"] = opt("low-confidence", "Which masks confidence reveals first.")
    cfg_scale: float = opt(0.0, "Strength of guidance by the prompt; above 0 every step costs two evaluations.", ge=0)
    temperature: float = opt(0.0, "Divides the logits; 0 takes the likeliest token.", ge=0)
    top_p: float = opt(1.0, "Draw from the likeliest tokens that together have this probability.", gt=0, le=1)
    top_k: int = opt(0, "Draw from this many likeliest tokens; 0 from all.", ge=0)
    seed: int = opt(1234, "Address of the draws.", ge=0)
    cache: Literal["none", "exact", "prefix"] = opt(
        "exact",
        "What is kept between evaluations: nothing; what changes no token (keys of a causal model, logits of a masked one while nothing is "
        "revealed); or also keys and values of finished blocks, an approximation for masked models.",
    )
    trace: Path | None = opt(None, "Write one JSON object per step to this file: places, tokens and log-probabilities that it revealed.")
    out: Path | None = opt(None, "Write one JSON object per sample to this file.")

    def check(self) -> None:
        if self.sampler == "ar" and self.max_new_tokens == 0:
            raise ConfigError("max_new_tokens: 0 leaves an autoregressive model nothing to write; use at least 1")
        if self.cache == "prefix" and (self.cfg_scale or self.sampler == "ar"):
            other = "cfg_scale" if self.cfg_scale else "sampler ar"
            raise ConfigError(f"cache: prefix goes without {other}; use exact, which changes no token")
        if bool(self.prompt) == bool(self.prompts_file):
            raise ConfigError("prompt: give --prompt or --prompts-file, one of the two")

    def prompts(self) -> list[str]:
        """The prompts, one per line of the file where there is one."""
        if self.prompts_file is None:
            return self.prompt
        try:
            return self.prompts_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompts_file: {self.prompts_file} cannot be read ({error}); name a text file") from None


@config
class BenchConfig:
    """Speed, memory and spread beside their targets."""

    only: list[str] = opt(help="Measurements to make: head, noise, fit, spread, sampler; default: all.", factory=list)
    threads: int = opt(1, "Threads of the tensor operations.", ge=1)
    repeats: int = opt(5, "Timed repetitions; their median counts.", ge=3)
