"""Options of `beacon train` and its relatives. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from beacon.config import BeaconConfig
from lm_core.config import Count, change, config, opt
from lm_core.deepspeed_settings import split
from lm_core.errors import ConfigError
from lm_core.flags import Word
from lm_core.guide import Meaning, TrainerSpellings, right
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
    beacon_param: list[str] = opt(
        help="Projections of which beacons have their own copy: q, k, v, o, mlp (up and down); default: q k v o.", factory=list
    )
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
    prefill_block_windows: int | None = opt(None, "Windows that are read at once outside training; default: 8.", ge=1)
    attn_impl: Literal["auto", "eager", "sdpa", "flex", "flash_attention_2"] | None = opt(
        None,
        "How attention is computed: eager, one dense softmax, the reference; sdpa, torch's fused kernels window by window; flex, FlexAttention "
        "over all windows, for GPUs; auto (default): by tiles of our own on a CPU, else sdpa; flash_attention_2 means auto.",
    )

    def chosen(self) -> dict[str, Any]:
        """Given settings, under the names of BeaconConfig."""
        names = [name for name in BeaconConfig.__dataclass_fields__ if name not in ("format_version", "attn_backend")]
        own = ("memory_budget", "on_budget", "on_capacity", "prefill_block_windows")
        fields = {name: getattr(self, name if name in own else f"beacon_{name}") for name in names}
        # a word of the guide
        fields["attn_backend"] = "auto" if self.attn_impl == "flash_attention_2" else self.attn_impl
        return {name: value for name, value in fields.items() if value not in (None, [])}


def settings(options: Any, stored: BeaconConfig | None) -> BeaconConfig:
    """The settings of a run: given ones over those of the model, or over the defaults."""
    chosen: Mapping[str, Any] = options.chosen()
    if stored is not None:
        return stored.changed(dict(chosen))
    return BeaconConfig.from_dict({"stride": chosen.get("window", 1024), **chosen})


@config
class TrainConfig(RunConfig, TrainerSpellings, BeaconOptions):
    """Beacons on a frozen language model, trained by next-token prediction."""

    words: ClassVar[Mapping[str, Word]] = {
        **TrainerSpellings.words,
        "--gradient-checkpointing-kwargs": Word("checkpointing is never reentrant", ('{"use_reentrant": false}',)),
        "--padding-side": Word("no token attends to padding"),
        "--use-fast": Word("the tokenizer is always the fast one", ("true",)),
        "--device-map": Word(
            "the model lies whole on --device, and --engine sharded splits one that a GPU does not hold", ("none", "auto", "cpu", "cuda")
        ),
    }
    model: str = change(ModelOptions, "model", flags=("--model-name-or-path",))
    data: list[str] = change(
        DataOptions,
        "data",
        flags=("--train-data",),
        help="Training data, repeatable: builtin:python-docs, builtin:stdlib, synthetic:NAME, a file, a folder, a hub id, or activation-beacon:PATH, "
        "long-llm:PATH, data:PATH under the data root; text, conversations or packed blocks; add [N] for N samples, @W for a weight.",
    )
    data_root: Path | None = opt(
        None, "Folder that prefixes such as activation-beacon: stand for; default: $BEACON_DATA_ROOT, else ./data."
    )
    chat_template: Literal["hf", "llama-2", "llama-3", "mistral", "qwen", "no"] = opt(
        "hf", "How conversations become text; hf: by the tokenizer's own template."
    )
    num_proc: int = opt(1, "Processes that tokenise conversations.", ge=1)
    group_by_stride: Literal["none", "strict", "relaxed"] = opt(
        "none",
        "Batches of rows with the same number of windows (strict, which leaves out what fills none) or with neighbouring ones (relaxed).",
    )
    sort_by_stride: Literal["none", "ascend", "descend"] = opt("none", "Rows by their number of windows, in one fixed order.")
    max_length: int = change(DataOptions, "max_length", default=4096)
    min_length: int = opt(0, "Shortest document in tokens; shorter ones are left out.", ge=0)
    packing: Literal["document", "stream", "best-fit"] = change(
        DataOptions,
        "packing",
        default="document",
        help="One document per sample, documents back to back, or whole documents that fit (needs --beacon-doc-mask true).",
    )
    micro_batch_size: int = change(EngineOptions, "micro_batch_size", default=1, flags=("--per-device-train-batch-size",))
    eval_micro_batch_size: int | None = change(
        EngineOptions,
        "eval_micro_batch_size",
        default=1,
        flags=("--per-device-eval-batch-size",),
        help="Samples per process in one forward pass of an evaluation.",
    )
    accumulate: int = change(EngineOptions, "accumulate", flags=("--gradient-accumulation-steps",))
    lr: float = change(OptimOptions, "lr", default=5e-5)
    schedule: Literal["cosine", "linear", "constant", "exp", "inverse-sqrt"] = change(
        OptimOptions, "schedule", default="linear", flags=("--lr-scheduler-type",)
    )
    budget: str = change(OutputOptions, "budget", default="", help="Replaces --num-train-epochs and --max-steps: for example 1M tokens.")
    num_train_epochs: int = opt(3, "Passes over the training data.", ge=1)
    max_steps: int = opt(-1, "Replaces the budget by this many updates; -1 leaves it to the epochs.", ge=-1)
    grad_clip: float = change(OptimOptions, "grad_clip", flags=("--max-grad-norm",))
    warmup: Count = change(OptimOptions, "warmup", flags=("--warmup-steps",))
    deepspeed_config: Path | None = change(EngineOptions, "deepspeed_config", flags=("--deepspeed",))
    cpu: bool = opt(False, "--device cpu.")
    save_every: str = change(OutputOptions, "save_every", default="500", flags=("--save-steps",))
    save_strategy: Literal["no", "steps", "epoch"] = opt("steps", "--save-every never, as given, or epoch.")
    keep_checkpoints: int = change(OutputOptions, "keep_checkpoints", default=0, flags=("--save-total-limit",))
    eval_every: str = change(OutputOptions, "eval_every", default="never", flags=("--eval-steps",))
    evaluation_strategy: Literal["no", "steps", "epoch"] | None = opt(
        None, "--eval-every never, as given (default: --log-every), or epoch.", flags=("--eval-strategy",)
    )
    log_every: int = change(OutputOptions, "log_every", flags=("--logging-steps",))
    seed: int = change(OutputOptions, "seed", default=42)
    enable_beacon: bool = opt(True, "Read through beacons; false trains the plain model (needs --lora-tune or --only-train-beacon false).")
    only_train_beacon: bool = opt(True, "Train the beacon weights only; false trains the backbone, too.")
    lora_tune: bool = opt(False, "Train low-rank adapters of the backbone, which final/ holds merged.")
    lora_rank: int = opt(32, "Rank of the adapters.", ge=1)
    lora_alpha: float = opt(16, "Adapters are scaled by lora_alpha / lora_rank.", gt=0)
    lora_dropout: float = opt(0.0, "Dropout in front of the adapters.", ge=0, lt=1)
    lora_targets: list[str] = opt(
        ["q_proj", "k_proj", "v_proj", "o_proj"], "Linear layers of the backbone that get an adapter.", min_length=1
    )
    lora_extra_params: list[str] = opt(help="Further parameters of the backbone to train, as parts of their names.", factory=list)
    use_reentrant: bool = opt(
        False, "Reentrant activation checkpointing, which loses the gradients of memory unless all windows are read at once."
    )
    beacon_engine: Literal["auto", "loop", "parallel"] = opt(
        "auto", "All windows in one pass (parallel), or one after the other (loop); auto trains in parallel."
    )
    save_format: Literal["full", "adapter"] = opt("full", "What final/ holds: the whole model, or the beacon weights alone.")
    eval_method: Literal["perplexity", "generation"] = opt(
        "perplexity",
        "What evaluations measure beside the loss; generation: ROUGE-L of the assistant's last turn, written greedily, as eval/SOURCE/rouge_l.",
    )
    eval_beacon_ratio: list[int] = opt(
        help="Compression ratios of evaluations; default: 32 where training has it, else those of training.", factory=list, ge=0
    )
    eval_beacon_ratio_mix: str | None = opt(None, "How a ratio is chosen in evaluations; default: as in inference.")
    eval_max_length: int | None = opt(None, "Tokens of a held-out row at most; default: max_length.", ge=2)
    eval_min_length: int = opt(2, "Shortest held-out row in tokens; shorter ones are left out.", ge=2)
    max_eval_num: int | None = opt(None, "Held-out rows of a source at most; default: all.", ge=1)
    dtype: Literal["auto", "fp32", "bf16"] = opt(
        "auto", "Type of frozen weights, beside float32 masters of what is trained; auto: bf16 on a GPU (replicated engine), else fp32."
    )
    load_in_4_bit: bool = opt(
        False, "Keep the frozen linear maps in four bits (NF4, by bitsandbytes); one process; final/ holds the base as it was."
    )
    distill_weight: float = opt(
        0.0, "Weight of the divergence from the model without beacons, added to the loss; the backbone must be frozen.", ge=0
    )
    distill_temperature: float = opt(1.0, "Temperature of both sides of that divergence.", gt=0)
    rope_theta: float | None = opt(None, "Base of the rotary embedding, instead of the checkpoint's.", gt=0)
    rope_method: Literal["linear", "dynamic", "yarn", "llama3"] | None = opt(
        None, "How the rotary embedding is scaled to longer texts (needs --rope-factor), instead of the checkpoint's way."
    )
    rope_factor: float | None = opt(None, "Factor of that scaling.", ge=1)
    max_position_embeddings: int | None = opt(None, "Positions that the model was made for, instead of the checkpoint's.", ge=1)
    mistral_sliding_window: int | None = opt(
        None, "Tokens that a raw token of mistral looks back, instead of the checkpoint's; 0: all.", ge=0
    )

    @classmethod
    def meanings(cls, values: Mapping[str, Any]) -> dict[str, list[Meaning]]:
        """What spellings of the guide mean in core's words.

        >>> TrainConfig.meanings({"cpu": "true", "save_strategy": "epoch"})
        {'cpu': [Meaning(option='device', value='cpu')], 'save_strategy': [Meaning(option='save_every', value='epoch')]}
        """
        found = super().meanings(values)
        often = {"epoch": "epoch", "no": "never"}
        if right(bool, values.get("cpu")):
            found["cpu"] = [Meaning("device", "cpu")]
        saving, strategy = (word if isinstance(word := values.get(name), str) else "" for name in ("save_strategy", "evaluation_strategy"))
        if saving in often:
            found["save_strategy"] = [Meaning("save_every", often[saving])]
        if strategy in often:
            found["evaluation_strategy"] = [Meaning("eval_every", often[strategy])]
        elif strategy == "steps" and values.get("eval_every", "never") == "never":
            found["evaluation_strategy"] = [Meaning("eval_every", str(values.get("log_every", 10)))]
        return found

    def check(self) -> None:
        if self.use_reentrant and (self.beacon_engine == "loop" or not self.enable_beacon):
            raise ConfigError(
                "use_reentrant: true loses the gradients of memory, or of a frozen embedding; use false, or --beacon-engine parallel"
            )
        if self.group_by_stride != "none" and self.sort_by_stride != "none":
            raise ConfigError(
                f"sort_by_stride: {self.sort_by_stride} and --group-by-stride {self.group_by_stride} contradict; drop one of them"
            )
        if not self.enable_beacon and not self.lora_tune and self.only_train_beacon:
            raise ConfigError("enable_beacon: false leaves nothing to train; add --lora-tune or --only-train-beacon false")
        if not self.enable_beacon and (self.group_by_stride, self.sort_by_stride) != ("none", "none"):
            raise ConfigError("group_by_stride: a plain model has no windows to group by; drop it, or enable the beacons")
        if self.lora_tune and not self.only_train_beacon:
            raise ConfigError("lora_tune: adapters of a backbone that is trained itself have no use; drop it, or --only-train-beacon false")
        if self.lora_extra_params and not self.lora_tune:
            raise ConfigError(f"lora_extra_params: {self.lora_extra_params} are trained with --lora-tune; add it")
        if self.budget and self.max_steps > 0:
            raise ConfigError(f"max_steps: {self.max_steps} and --budget {self.budget!r} both set the length; drop one of them")
        if self.max_steps == 0:
            raise ConfigError("max_steps: 0 would train nothing; give a number of updates, or -1 for --num-train-epochs")
        if self.min_length > self.max_length:
            raise ConfigError(f"min_length: {self.min_length} is larger than max_length ({self.max_length}); use at most {self.max_length}")
        if self.beacon_engine == "loop" and split(self)[0] == 3:
            raise ConfigError("beacon_engine: loop runs modules once per window, which sharded weights cannot follow; use parallel")
        if self.eval_method == "generation" and (not self.enable_beacon or self.beacon_doc_mask or split(self)[0] == 3):
            raise ConfigError(
                "eval_method: generation reads rows of one document through beacons, with whole weights; use perplexity, or enable the beacons, "
                "drop --beacon-doc-mask and shard no weights"
            )
        if self.load_in_4_bit and (not self.enable_beacon or not self.only_train_beacon or self.lora_tune):
            raise ConfigError(
                "load_in_4_bit: four bits cannot be trained or merged into; enable the beacons, and drop --lora-tune and --only-train-beacon false"
            )
        if self.load_in_4_bit and (self.deepspeed_config is not None or self.num_processes > 1):
            raise ConfigError("load_in_4_bit: one process holds the weights, without DeepSpeed; drop --deepspeed and --num-processes")
        if self.distill_weight and (not self.enable_beacon or not self.only_train_beacon or self.lora_tune):
            raise ConfigError(
                f"distill_weight: {self.distill_weight:g} measures beacons by a frozen backbone; enable the beacons, and drop --lora-tune and "
                "--only-train-beacon false"
            )
        if self.distill_weight and split(self)[0] == 3:
            raise ConfigError(f"distill_weight: {self.distill_weight:g} needs whole weights of the output head; shard none")
        if self.distill_temperature != 1 and not self.distill_weight:
            raise ConfigError(f"distill_temperature: {self.distill_temperature:g} has no effect without --distill-weight; add it")
        if self.save_format == "adapter" and (not self.only_train_beacon or self.lora_tune):
            raise ConfigError("save_format: adapter would lose the trained backbone; use full")
        changed = (self.rope_theta, self.rope_method, self.rope_factor, self.max_position_embeddings, self.mistral_sliding_window)
        if self.save_format == "adapter" and any(value is not None for value in changed):
            raise ConfigError("save_format: adapter refers to a base with its own positions, which this run changes; use full")
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
class TaskOptions(ReadOptions):
    """Questions that are answered by writing."""

    batch_size: int = opt(1, "Questions at a time.", ge=1)
    baseline: list[Literal["full"]] = opt(help="Also ask the base model with full attention.", factory=list)
    chat_template: Literal["hf", "llama-2", "llama-3", "mistral", "qwen", "no"] = opt(
        "no", "How questions are put; no: as text that the model goes on from."
    )
    max_new_tokens: int | None = opt(None, "Tokens of an answer at most; default: what the task needs.", ge=1)
    do_sample: bool = opt(False, "Draw tokens instead of taking the most likely one.")
    temperature: float = opt(1.0, "Temperature of --do-sample.", gt=0)
    top_p: float = opt(1.0, "Share of the probability that --do-sample draws from.", gt=0, le=1)
    output_dir: Path | None = opt(None, "Folder for result.json, items.jsonl, items.csv and figures/.", flags=("-o",))
    overwrite: bool = opt(False, "Ask again what output_dir already holds.")


@config
class GridOptions(TaskOptions):
    """Lengths and depths of a heat map."""

    min_length: int = opt(8192, "Tokens of the shortest prompt.", ge=1)
    max_length: int = opt(131072, "Tokens of the longest prompt.", ge=1)
    num_length_interval: int = opt(10, "Lengths.", ge=1)
    num_depth_interval: int = opt(10, "Depths.", ge=1)
    test_length: list[int] = opt(help="These lengths instead.", factory=list, ge=1)
    test_depth: list[int] = opt(help="These depths instead, in percent of the haystack.", factory=list, ge=0, le=100)
    min_depth: int = opt(0, "Smallest depth in percent of the haystack.", ge=0, le=100)
    max_depth: int = opt(100, "Largest depth in percent of the haystack.", ge=0, le=100)

    def check(self) -> None:
        if self.min_length > self.max_length:
            raise ConfigError(f"min_length: {self.min_length} is larger than max_length ({self.max_length}); use at most that")
        if self.min_depth > self.max_depth:
            raise ConfigError(f"min_depth: {self.min_depth} is larger than max_depth ({self.max_depth}); use at most that")


@config
class HaystackOptions(TaskOptions):
    """The text around what is asked for."""

    haystack: list[str] = opt(
        help="Text around what is asked for: data arguments such as builtin:python-docs; default: made-up sentences.", factory=list
    )
    text_column: str = change(DataOptions, "text_column")


@config
class NeedleConfig(GridOptions, HaystackOptions):
    """A sentence somewhere in a long text."""

    needle: str = opt(
        "The best thing to do in San Francisco is sit in Dolores Park and eat a sandwich on a sunny day.", "Sentence that is hidden."
    )
    question: str = opt("What is the best thing to do in San Francisco? Answer:", "Question at the end of the prompt.")
    answer: str | None = opt(None, "Answer that is expected; default: the needle.")
    num_needle: int = opt(1, "Copies of the needle, spread from its depth to the end.", ge=1)


@config
class PasskeyConfig(GridOptions):
    """A number somewhere in a long text."""

    num_length_interval: int = change(GridOptions, "num_length_interval", default=20)
    passkey_length: int = opt(5, "Digits of the key.", ge=1)
    num_trials: int = opt(1, "Keys per length and depth.", ge=1)


@config
class TopicConfig(TaskOptions):
    """Which topic of a long conversation came k-th."""

    num_topics: list[int] = opt([5, 10, 15, 20, 25, 30, 40, 50, 60, 70], "Topics of a conversation.", min_length=1, ge=1)
    target: Literal["first", "k-th"] = opt("first", "Which topic is asked for.")
    num_trials: int = opt(5, "Conversations for each number of topics.", ge=1)


@config
class MultiturnConfig(HaystackOptions):
    """Several questions on one long text."""

    length: int = opt(8192, "Tokens of the text.", ge=1)
    turns: int = opt(6, "Questions, one after the other.", ge=1)


@config
class FilesConfig(TaskOptions):
    """Questions in local files."""

    data_dir: Path | None = opt(None, "Folder of TASK.jsonl files; default: a few made-up rows.")
    tasks: list[str] = opt(help="Tasks to run; default: those that have a file.", factory=list)
    max_samples: int | None = opt(None, "Rows of a task at most.", ge=1)
    max_length: int = opt(31500, "Tokens of a prompt and its answer; the middle of longer contexts is cut out.", ge=2)


@config
class LongbenchConfig(FilesConfig):
    """Tasks of LongBench."""


@config
class InfbenchConfig(FilesConfig):
    """Question and summary tasks of InfiniteBench."""

    max_length: int = change(FilesConfig, "max_length", default=128000)


@config
class ShortConfig(TaskOptions):
    """Multiple choice on short texts."""

    data_file: Path | None = opt(None, "JSONL file with question, choices and answer (a number from 0); default: made-up questions.")


@config
class CostConfig(ReadOptions):
    """Seconds and bytes by the length of the context."""

    model: str = change(
        ModelOptions,
        "model",
        flags=("--model-name-or-path",),
        help="A run folder, a folder with beacon weights, or any model argument: a base costs what it will cost with beacons.",
    )
    lengths: list[int] = opt([512, 1024, 2048, 4096], "Tokens of context.", min_length=1, ge=1)
    tokens: int = opt(5, "Tokens that are written behind each context.", ge=1)
    repeats: int = opt(1, "Readings of each context; the median counts.", ge=1)
    baseline: list[Literal["full"]] = opt(help="Also measure the base model with full attention.", factory=list)
    output_dir: Path | None = opt(None, "Folder for result.json, items.jsonl, items.csv and figures/.", flags=("-o",))
    overwrite: bool = opt(False, "Measure again what output_dir already holds.")


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
class PretrainDataConfig:
    """Text packed into blocks of tokens."""

    train_data: list[str] = opt(
        help="A folder of SOURCE.jsonl files, or SOURCE=DATA for several data arguments (docs=builtin:python-docs); default: the folder "
        "slimpajama in $BEACON_DATA_ROOT, else in ./data.",
        factory=list,
    )
    mixture: str | None = opt(
        None,
        "Percent by source: a JSON file, slimpajama, even or code; default: slimpajama for a folder, equal shares for SOURCE=DATA.",
        flags=("--config",),
    )
    output_dir: Path = opt(help="Folder to write.", flags=("-o",))
    num_token: list[str] = opt(["8192:2b"], "LENGTH:COUNT: tokens of a block, and tokens in all.", min_length=1)
    model: str = change(ModelOptions, "model", flags=("--model-name-or-path",), help="Model whose tokenizer is used.")
    tokenizer: str | None = change(ModelOptions, "tokenizer")
    text_column: str = change(DataOptions, "text_column")
    add_bos: bool = opt(True, "Put the begin token before every document.")
    add_eos: bool = opt(True, "Put the end token behind every document.")
    doc_ids: bool = opt(True, "Write which document every token belongs to.")
    seed: int = change(OutputOptions, "seed", default=123)
    num_proc: int = opt(1, "Processes that tokenise; the result does not depend on it.", ge=1)
    shard_size: str = opt("500MB", "Size of a file at most.", pattern=r"\d+(KB|MB|GB|KiB|MiB|GiB)")
    allow_missing: bool = opt(False, "Go on where a source of the mixture is missing or has too little text.")
    short_documents: Literal["keep", "drop"] = opt("keep", "Whether documents under --min-doc-length are packed or left out.")
    min_doc_length: int = opt(0, "Tokens below which --short-documents drop leaves a document out.", ge=0)

    def check(self) -> None:
        if self.min_doc_length and self.short_documents == "keep":
            raise ConfigError(f"min_doc_length: {self.min_doc_length} has no effect with --short-documents keep; use drop")


@config
class RecallDataConfig:
    """Rows that ask for what they said before."""

    output_dir: Path = opt(help="Folder to write.", flags=("-o",))
    model: str = change(ModelOptions, "model", flags=("--model-name-or-path",), help="Model whose tokenizer is used.")
    tokenizer: str | None = change(ModelOptions, "tokenizer")
    haystack: list[str] = opt(
        ["synthetic:markov"], "Text around what is asked for: data arguments, without their held-out documents.", min_length=1
    )
    text_column: str = change(DataOptions, "text_column")
    kinds: list[Literal["passkey", "keys", "needle", "copy"]] = opt(
        ["passkey", "keys", "copy", "needle"],
        "What rows ask for, in turn: a number, several numbers, sentences of drawn words, or the whole text again.",
        min_length=1,
    )
    num_rows: int = opt(2000, "Rows.", ge=1)
    length: int = opt(512, "Tokens of a row.", ge=8)
    seed: int = change(OutputOptions, "seed", default=42)


@config
class BenchConfig:
    """Ratios beside their baselines."""

    only: list[Literal["P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P9"]] = opt(
        help="What to measure; default: everything.", factory=list
    )
    repeats: int = opt(3, "Measurements of each; the median counts.", ge=3)
    threads: int = opt(1, "Threads of the tensor operations.", ge=1)
    device: Literal["auto", "cpu", "cuda"] = change(EngineOptions, "device", help="Device to run on.")
    seed: int = opt(0, "Seed of weights and tokens.", ge=0)
