"""Options of `beacon train` and its relatives. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from beacon.config import BeaconConfig
from lm_core.config import change, config, opt
from lm_core.deepspeed_settings import split
from lm_core.errors import ConfigError
from lm_core.options import DataOptions, EngineOptions, ModelOptions, OptimOptions, OutputOptions, RunConfig
from lm_core.progress import Budget


@config
class BeaconOptions:
    """The settings of a beacon model; what is not given comes from the model, or from the defaults of a new one."""

    beacon_window: int | None = opt(None, "Raw tokens of a window; a new model's default is 1024.", ge=1)
    beacon_stride: int | None = opt(None, "Raw tokens between the starts of two windows; default: the window.", ge=1)
    beacon_ratio: list[int] = opt(help="Compression ratios to choose from; 0 keeps a window raw; default: 2 4 8 16 32.", factory=list, ge=0)
    beacon_ratio_mix: str | None = opt(
        None, "How a ratio is chosen in training: step-random (default), instance-random, mix-random, sequence or adapt-X."
    )
    beacon_inference_ratio_mix: str | None = opt(None, "How a ratio is chosen outside training; default: adapt-1024.")
    beacon_attn: Literal["step-expansion", "segmentation", "full-coverage"] | None = opt(
        None, "What a beacon sees of its window; default: step-expansion."
    )
    beacon_attend_prev: bool | None = opt(None, "Whether a beacon sees the earlier beacons of its window; default: true.")
    beacon_sink_size: int | None = opt(None, "First tokens whose keys and values stay in memory; default: 0.", ge=0)
    beacon_param: list[str] = opt(help="Projections of which beacons have their own copy; default: q k v o.", factory=list)
    beacon_pos: Literal["append", "interleave"] | None = opt(None, "Beacons after their window (default), or one after every unit.")
    beacon_embed_init: Literal["eos", "bos"] | None = opt(None, "Token whose embedding the beacon starts from; default: eos.")

    beacon_doc_mask: bool | None = opt(None, "Documents of one row do not see each other, with --packing best-fit; default: false.")
    memory_budget: int | None = opt(None, "Memory entries per row at most, sinks included; default: no limit.", ge=1)
    on_budget: Literal["error", "evict", "adapt"] | None = opt(
        None, "When memory outgrows its budget: stop (default), drop the oldest windows, or choose the ratio for it beforehand."
    )
    on_capacity: Literal["error", "warn", "evict"] | None = opt(
        None, "When a text needs more positions than the model has, outside training: stop (default), go on, or drop the oldest windows."
    )

    def chosen(self) -> dict[str, Any]:
        """Given settings, under the names of BeaconConfig."""
        names = [name for name in BeaconConfig.__dataclass_fields__ if name != "format_version"]
        own = ("memory_budget", "on_budget", "on_capacity")
        fields = {name: getattr(self, name if name in own else f"beacon_{name}") for name in names}
        return {name: value for name, value in fields.items() if value not in (None, [])}


def settings(options: Any, stored: BeaconConfig | None) -> BeaconConfig:
    """The settings of a run: given ones over those of the model, or over the defaults."""
    chosen: Mapping[str, Any] = options.chosen()
    if stored is not None:
        return stored.changed(dict(chosen))
    return BeaconConfig.from_dict({"stride": chosen.get("window", 1024), **chosen})


@config
class TrainConfig(RunConfig, BeaconOptions):
    """Beacons on a frozen language model, trained by next-token prediction."""

    model: str = change(ModelOptions, "model", flags=("--model-name-or-path",))
    data: list[str] = change(DataOptions, "data", flags=("--train-data",))
    max_length: int = change(DataOptions, "max_length", default=4096)
    min_length: int = opt(0, "Shortest document in tokens; shorter ones are left out.", ge=0)
    packing: Literal["document", "stream", "best-fit"] = change(
        DataOptions,
        "packing",
        default="document",
        help="One document per sample, documents back to back, or whole documents that fit (needs --beacon-doc-mask true).",
    )
    micro_batch_size: int = change(EngineOptions, "micro_batch_size", default=1, flags=("--per-device-train-batch-size",))
    accumulate: int = change(EngineOptions, "accumulate", flags=("--gradient-accumulation-steps",))
    lr: float = change(OptimOptions, "lr", default=5e-5)
    schedule: Literal["cosine", "linear", "constant", "exp", "inverse-sqrt"] = change(
        OptimOptions, "schedule", default="linear", flags=("--lr-scheduler-type",)
    )
    budget: str = change(OutputOptions, "budget", default="", help="Replaces --num-train-epochs and --max-steps: for example 1M tokens.")
    num_train_epochs: int = opt(3, "Passes over the training data.", ge=1)
    max_steps: int = opt(-1, "Replaces the budget by this many updates; -1 leaves it to the epochs.", ge=-1)
    grad_clip: float = change(OptimOptions, "grad_clip", flags=("--max-grad-norm",))
    save_every: str = change(OutputOptions, "save_every", default="500")
    seed: int = change(OutputOptions, "seed", default=42)
    only_train_beacon: bool = opt(True, "Train the beacon weights only; false trains the backbone, too.")
    beacon_engine: Literal["auto", "loop", "parallel"] = opt(
        "auto", "All windows in one pass (parallel), or one after the other (loop); auto trains in parallel."
    )
    save_format: Literal["full", "adapter"] = opt("full", "What final/ holds: the whole model, or the beacon weights alone.")
    eval_beacon_ratio: list[int] = opt(help="Compression ratios of evaluations; default: those of training.", factory=list, ge=0)
    eval_beacon_ratio_mix: str | None = opt(None, "How a ratio is chosen in evaluations; default: as in inference.")

    def check(self) -> None:
        if self.budget and self.max_steps > 0:
            raise ConfigError(f"max_steps: {self.max_steps} and --budget {self.budget!r} both set the length; drop one of them")
        if self.max_steps == 0:
            raise ConfigError("max_steps: 0 would train nothing; give a number of updates, or -1 for --num-train-epochs")
        if self.min_length > self.max_length:
            raise ConfigError(f"min_length: {self.min_length} is larger than max_length ({self.max_length}); use at most {self.max_length}")
        if self.beacon_engine == "loop" and split(self)[0] == 3:
            raise ConfigError("beacon_engine: loop runs modules once per window, which sharded weights cannot follow; use parallel")
        if self.save_format == "adapter" and not self.only_train_beacon:
            raise ConfigError("save_format: adapter would lose the trained backbone; use full")
        if self.packing == "best-fit" and not self.beacon_doc_mask:
            raise ConfigError(
                "packing: best-fit joins documents that would see each other; add --beacon-doc-mask true, or use document or stream"
            )
        if self.packing == "stream" and self.beacon_doc_mask:
            raise ConfigError("beacon_doc_mask: a stream does not say where its documents end; use --packing best-fit")

    def limits(self) -> Budget:
        if self.budget:
            return Budget.parse(self.budget)
        return Budget({"steps": self.max_steps} if self.max_steps > 0 else {"epochs": self.num_train_epochs})


@config
class ReadOptions(BeaconOptions):
    """A trained model and how it reads."""

    model: str = change(ModelOptions, "model", flags=("--model-name-or-path",), help="A run folder, or a folder with beacon weights.")
    device: Literal["auto", "cpu", "cuda"] = change(EngineOptions, "device", help="Device to run on.")
    seed: int = change(OutputOptions, "seed", default=42)


@config
class LmConfig(ReadOptions):
    """Perplexity by context length."""

    eval_data: list[str] = opt(help="Text: a data argument such as builtin:python-docs, of which the held-out part is read.", factory=list)
    text_column: str = change(DataOptions, "text_column")
    packing: Literal["document", "stream"] = opt("document", "One document at a time, or documents back to back.")
    max_length: int = opt(32768, "Tokens of context at most.", ge=2)
    min_length: int = opt(0, "Shortest document in tokens; shorter ones are left out.", ge=0)
    stride: int | None = opt(
        None, "Tokens that are newly scored per pass over a longer document; 0 makes one pass; default: 2048, at most max_length.", ge=0
    )
    max_sample_num: int = opt(100, "Documents at most.", ge=1)
    baseline: list[Literal["full", "truncate"]] = opt(
        help="Also score the base model with full attention, or with only the tokens of the open window.", factory=list
    )
    output_dir: Path | None = opt(None, "Folder for result.json, items.jsonl, items.csv and figures/.", flags=("-o",))
    overwrite: bool = opt(False, "Score again what output_dir already holds.")

    def check(self) -> None:
        if not self.eval_data:
            raise ConfigError("eval_data: nothing to read; give for example --eval-data builtin:python-docs")
        if self.stride is not None and self.stride > self.max_length:
            raise ConfigError(
                f"stride: {self.stride} is larger than max_length ({self.max_length}) and would skip tokens; use at most that"
            )

    @property
    def step(self) -> int:
        """Tokens newly scored per pass; 0 for one pass."""
        return min(2048, self.max_length) if self.stride is None else self.stride


@config
class CompressConfig(ReadOptions):
    """Read a text into a memory file."""

    input: list[str] = opt(help="Text: data arguments such as builtin:python-docs[8]; rows are joined by a blank line.", factory=list)
    output: Path = opt(help="Memory file to write.", flags=("-o",))
    text_column: str = change(DataOptions, "text_column")
    expected_length: int | None = opt(None, "Tokens that will be read in all, if more is to come; adaptive ratios are chosen for it.", ge=1)

    def check(self) -> None:
        if not self.input:
            raise ConfigError("input: nothing to read; give for example --input builtin:python-docs[8]")


@config
class GenerateConfig(ReadOptions):
    """Write on from a prompt, and from a memory."""

    prompt: str | None = opt(None, "Text to go on from.")
    prompt_file: Path | None = opt(None, "File with the text to go on from.")
    memory: Path | None = opt(None, "Memory file that comes before the prompt.")
    max_new_tokens: int = opt(256, "Tokens to write at most.", ge=1)
    do_sample: bool = opt(False, "Draw tokens instead of taking the most likely one.")
    temperature: float = opt(1.0, "Temperature of --do-sample.", gt=0)
    top_p: float = opt(1.0, "Share of the probability that --do-sample draws from.", gt=0, le=1)
    stream: bool = opt(False, "Print words as they are written.")

    def check(self) -> None:
        if (self.prompt is None) == (self.prompt_file is None):
            raise ConfigError("prompt: give the text to go on from, by exactly one of --prompt and --prompt-file")
        if self.prompt == "":
            raise ConfigError("prompt: empty; give at least one word")


@config
class ExportConfig:
    """Write a model folder in another form."""

    model: str = change(ModelOptions, "model", flags=("--model-name-or-path",), help="A run folder, or a folder with beacon weights.")
    output_dir: Path = opt(help="Folder to write.", flags=("-o",))
    format: Literal["full", "adapter"] = opt("full", "The whole model, or the beacon weights alone.")
    base: str | None = opt(None, "Name of the base model that an adapter refers to; default: that of the run.")


@config
class ImportConfig:
    """Read a folder with flat beacon_* settings and write it in our layout."""

    source: Path = opt(help="Folder with config.json and safetensors or pytorch_model.bin files.", flags=("--from",))
    output_dir: Path = opt(help="Folder to write.", flags=("-o",))


@config
class BenchConfig:
    """Ratios beside their baselines."""

    only: list[Literal["P1", "P2", "P3", "P4", "P6"]] = opt(help="What to measure; default: everything.", factory=list)
    repeats: int = opt(3, "Measurements of each; the median counts.", ge=3)
    threads: int = opt(1, "Threads of the tensor operations.", ge=1)
