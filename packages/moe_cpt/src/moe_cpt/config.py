"""Options of `moe-cpt train`, `plan` and `sft`: the spellings of the original guide over the options that every command shares."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from lm_core.config import Count, change, config, explicit, opt
from lm_core.errors import ConfigError
from lm_core.flags import Word
from lm_core.guide import Meaning, TrainerSpellings, right
from lm_core.options import DataOptions, EngineOptions, ModelOptions, OptimOptions, OutputOptions, RunConfig
from lm_core.progress import Budget, Every, Progress, Size
from lm_core.schedule import learning_rate
from moe_cpt.options.conversion import CALCULATOR_TYPE, GATE_TYPE, CalculatorType, GateNetwork, GateType
from moe_cpt.plan import Plan, steps_of_tokens
from moe_cpt.schedule import clipped_cosine, parse_k_schedule

# options that only a conversion uses: a checkpoint's router and experts have their shape already
CONVERSION = ("num_experts", "gate_network")
ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout", "trainable", "modules_to_save", "peft_path")
DYNAMIC = ("dynamic_eta", "dynamic_smoothing", "dynamic_min_weight", "dynamic_max_weight")
SIZES_OF_STEP = ("micro_batch_size", "accumulate", "max_length", "num_nodes", "num_gpu_per_node", "num_processes")


@config
class TrainConfig(RunConfig, TrainerSpellings):
    """Continued pre-training of a mixture of experts made from a dense LLaMA."""

    words: ClassVar[Mapping[str, Word]] = {
        **TrainerSpellings.words,
        "--num-train-epochs": Word("--max_steps, --num_tokens or --budget sets the length"),
        "--save-strategy": Word("--save_steps counts steps", ("steps",)),
        "--evaluation-strategy": Word("--eval_steps counts steps", ("steps",)),
    }
    model: str = change(
        ModelOptions,
        "model",
        help="Mixture written by moe-cpt convert, or with --from-dense a dense model: a folder, a .gguf file, smollm2-135m, llama_test or a hub id.",
        flags=("--model_name_or_path",),
    )
    tokenizer: str | None = change(ModelOptions, "tokenizer", flags=("--tokenizer_name_or_path",))
    from_dense: Literal["none", "random", "clustering"] = opt(
        "none", "Split and convert a dense --model first, by this method, into init/ of the run folder."
    )
    num_experts: int = opt(16, "With --from-dense: routed experts per layer.", ge=1)
    num_selects: int | None = opt(None, "Experts that see a token; default: the checkpoint's, 4 with --from-dense.", ge=1)
    score_scale_factor: float | None = opt(
        None,
        "Factor of the routed experts' output; default: the checkpoint's, experts over selected experts with --from-dense.",
        gt=0,
        flags=("--moe_calculator_score_scale_factor",),
    )
    gate_network: GateNetwork = opt("mlp", "With --from-dense: shape of the router.", flags=("--gate_network_type",))
    model_type: Literal["llama", "llama_moe"] | None = opt(
        None, "What --model must be, looked up before it is loaded: llama_moe, or with --from-dense llama; default: not looked up."
    )
    debug_mode: bool = opt(False, "Try the run on the first two layers of --model and the first file of each folder of --data.")
    mode: Literal["fpt", "lora"] = opt("fpt", "Train all weights, or low-rank adapters and the routers.")
    lora_rank: int = opt(8, "With --mode lora: rank of the adapters.", ge=1)
    lora_alpha: float = opt(32.0, "Adapters are scaled by alpha / rank.", gt=0)
    lora_dropout: float = opt(0.1, "Dropout in front of the adapters of linear layers.", ge=0, lt=1)
    trainable: str = opt(
        "q_proj,v_proj", "Comma list of what gets adapters: names of linear layers; gate_proj, up_proj and down_proj mean all experts."
    )
    modules_to_save: str = opt("", "Comma list of modules that are trained in full beside the adapters.")
    peft_path: Path | None = opt(None, "Adapter of an earlier run to go on with; its own settings hold.")
    gate_type: GateType | None = opt(None, f"{GATE_TYPE} Default: the checkpoint's.")
    calculator_type: CalculatorType | None = opt(None, f"{CALCULATOR_TYPE} Default: the checkpoint's.")
    gate_balance_loss_weight: float | None = opt(None, "Weight of the balance loss; default: the checkpoint's, else 0.01.", ge=0)
    balance_scope: Literal["micro", "global"] = opt(
        "micro", "Experts are balanced over each process's micro-batch, or over all processes and the micro-batches of a step so far."
    )
    experts_backend: Literal["auto", "fused", "grouped_mm", "loop"] = opt(
        "auto", "How experts are computed; auto is fused where its kernels can be had, else grouped_mm."
    )
    k_schedule: str | None = opt(
        None,
        "Selected experts from a step on, as STEP:K or STEP:K:FACTOR, for example 0:16,1000:8,3000:4; the factor is K by default. "
        "Begins as the dense model where the first K is all experts and --gate_init was zeros.",
    )
    freeze_router: bool = opt(False, "Do not train the routers.", flags=("--freeze_gate",))
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = opt(
        "sdpa", "Implementation of attention; flash_attention_2 needs the package flash-attn and a GPU."
    )

    data: list[str] = change(
        DataOptions,
        "data",
        help="Training data, repeatable or a comma list: a folder with one folder per source, builtin:python-docs, builtin:stdlib, synthetic:NAME, "
        "a file, a folder or a hub id; add [N] for N samples, @W for a weight.",
        flags=("--dataset_dir",),
    )
    eval_data: list[str] = change(
        DataOptions,
        "eval_data",
        help="Held-out data, written like --data, or a folder with one file per source; default: the held-out split of --data.",
        flags=("--validation_dir",),
    )
    validation_split_percentage: float | None = opt(None, "--hold-out in percent.", gt=0, lt=100)
    num_workers: int = change(DataOptions, "num_workers", flags=("--dataloader_num_workers",))
    data_cache_dir: Path | None = opt(None, "Folder for tokenised data; default: $LM_CORE_CACHE, else ~/.cache/lm_core.")
    prob_map: str | None = opt(
        None,
        "Shares of the sources: llama, sheared_llama, uniform, a JSON or YAML file, or inline JSON; "
        "default: llama for a folder of sources, else the weights of --data, else equal.",
    )
    on_exhausted: Literal["repeat", "stop", "renormalize"] = opt(
        "repeat", "When all samples of a source were read: read them again, end the run, or leave its share to the others."
    )
    dynamic_data_selection: Literal["none", "sheared_llama", "sheared_llama_paper"] = opt(
        "none", "After each evaluation, move the shares towards sources whose loss exceeds its reference most."
    )
    reference_loss: Path | None = opt(
        None, "JSON file of losses by source, as written by moe-cpt ref-loss; default: LLaMA-2-7B on SlimPajama."
    )
    dynamic_eta: float = opt(1.0, "Step size of the shares' update.", gt=0)
    dynamic_smoothing: float = opt(1e-4, "Part of all shares that is spread evenly at each update.", ge=0, le=1)
    dynamic_min_weight: float = opt(0.0, "Least share of a source.", ge=0, le=1)
    dynamic_max_weight: float = opt(1.0, "Largest share of a source.", gt=0, le=1)

    max_length: int = change(DataOptions, "max_length", default=2048, flags=("--block_size",))
    document_mask: bool = opt(False, "With --packing stream: documents of a sample do not see each other, and positions start again.")
    lr: float = change(OptimOptions, "lr", default=2e-4)
    lr_floor_style: Literal["clipped", "scaled"] = opt(
        "clipped", "Cosine to 0 that stops at the final rate, or one that reaches the final rate at the end of the run."
    )
    min_lr_ratio: float = change(OptimOptions, "min_lr_ratio", flags=("--final_lr_portion",))
    warmup: Count = change(OptimOptions, "warmup", default=100, flags=("--warmup_steps",))
    warmup_tokens: Count | None = opt(None, "--warmup in tokens, as whole steps, at least one.", ge=1)
    weight_decay: float = change(
        OptimOptions, "weight_decay", default=0.1, help="Decoupled weight decay; not applied to biases, norms and router noise."
    )
    betas: tuple[float, float] = change(OptimOptions, "betas", default=(0.9, 0.95))
    grad_clip: float = change(OptimOptions, "grad_clip", flags=("--max_grad_norm",))
    precision: Literal["fp32", "bf16", "fp16"] = change(EngineOptions, "precision", default="bf16")
    torch_dtype: Literal["auto", "bfloat16", "float16", "float32"] = opt("auto", "--precision in torch's words; auto leaves it.")
    deepspeed_config: Path | None = change(EngineOptions, "deepspeed_config", flags=("--deepspeed",))
    micro_batch_size: int = change(EngineOptions, "micro_batch_size", flags=("--per_device_train_batch_size",))
    eval_micro_batch_size: int | None = change(EngineOptions, "eval_micro_batch_size", flags=("--per_device_eval_batch_size",))
    accumulate: int = change(EngineOptions, "accumulate", flags=("--gradient_accumulation_steps",))
    num_nodes: int | None = opt(None, "Machines of the run, for its plan; default: those of the launcher.", ge=1)
    num_gpu_per_node: int | None = opt(None, "Processes per machine, for its plan; default: those of the launcher.", ge=1)
    flops_per_device: float | Literal["auto"] = opt(
        312e12, "Peak FLOP/s of one device, for speed/mfu; 312e12 is an A100 in bfloat16, 989e12 an H200, auto looks the device up.", gt=0
    )

    num_tokens: Count = opt(10**11, "Tokens to train on; whole updates are counted.", ge=1, flags=("--max_tokens",))
    max_steps: int | None = opt(None, "Updates to make, in place of --num-tokens.", ge=1)
    max_train_samples: Count | None = opt(None, "One more limit: end before a batch that would pass so many samples.", ge=1)
    budget: str = change(
        OutputOptions, "budget", default="", help="Replaces --num-tokens and --max-steps: for example 300 steps, or 2 hours."
    )
    seed: int = change(OutputOptions, "seed", default=1227)
    overwrite: bool = change(OutputOptions, "overwrite", flags=("--overwrite_output_dir",))
    save_every: str = change(OutputOptions, "save_every", flags=("--save_steps",))
    keep_checkpoints: int = change(OutputOptions, "keep_checkpoints", default=1, flags=("--save_total_limit",))
    keep_optimizer: int = change(OutputOptions, "keep_optimizer", default=1, flags=("--save_optim_limit",))
    eval_every: str = change(OutputOptions, "eval_every", flags=("--eval_steps",))
    eval_tokens: Count = change(
        OutputOptions, "eval_tokens", help="--eval-every in tokens, as whole steps, at least one; 0 leaves it to --eval-every."
    )
    held_out_tokens: Count = opt(0, "Held-out tokens per source and evaluation; 0 uses all.", ge=0)
    log_every: int = change(OutputOptions, "log_every", default=5, flags=("--logging_steps",))
    log_first: bool = change(OutputOptions, "log_first", flags=("--logging_first_step",))
    allow_data_change: bool = opt(
        False,
        "With --resume: --data, --prob-map, --reference-loss, --block-size, --seed and the global batch may differ from the checkpoint's.",
    )
    comment: str = opt("", "What the run is for; kept in its record.")
    require_checklist: bool = opt(False, "Print the checklist and stop, before anything is loaded, when an item fails.")

    @classmethod
    def meanings(cls, values: Mapping[str, Any]) -> dict[str, list[Meaning]]:
        found = super().meanings(values)
        precisions = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
        if isinstance(dtype := values.get("torch_dtype"), str) and dtype in precisions:
            found["torch_dtype"] = [Meaning("precision", precisions[dtype])]
        if percent := right(float, values.get("validation_split_percentage")):
            found["validation_split_percentage"] = [Meaning("hold_out", percent / 100)]
        if eval_tokens := right(Count, values.get("eval_tokens")):
            found["eval_tokens"] = [Meaning("eval_every", str(max(1, int(eval_tokens) // tokens_of_step(cls, values))))]
        if warmup_tokens := right(Count, values.get("warmup_tokens")):
            budget = right(str, values.get("budget"))
            unit = Budget.parse(budget).unit if budget else "steps"
            # --warmup is given in the unit of the budget
            if unit in ("steps", "tokens"):
                size = tokens_of_step(cls, values) if unit == "steps" else 1
                found["warmup_tokens"] = [Meaning("warmup", max(1, int(warmup_tokens) // size))]
        return found

    def check(self) -> None:
        given = explicit(self)
        if self.from_dense == "none":
            for name in CONVERSION:
                if name in given:
                    raise ConfigError(f"{name}: {getattr(self, name)} belongs to --from-dense; a checkpoint has its own, so leave it out")
        elif self.num_selects is not None and self.num_selects > self.num_experts:
            raise ConfigError(f"num_selects: {self.num_selects} of {self.num_experts} experts; use 1 to {self.num_experts}")
        for name in ADAPTERS:
            if name in given and self.mode != "lora":
                raise ConfigError(f"{name}: {getattr(self, name)} belongs to --mode lora; add that, or leave it out")
        if self.peft_path is not None and (clash := given & set(ADAPTERS) - {"peft_path"}):
            raise ConfigError(f"{min(clash)}: the adapter in {self.peft_path} has its own; leave one of them out")
        if self.allow_data_change and self.resume == "none":
            raise ConfigError("allow_data_change: nothing is resumed; add --resume auto, or leave it out")
        if self.k_schedule is not None:
            parse_k_schedule(self.k_schedule)
            if clash := given & {"num_selects", "score_scale_factor"}:
                raise ConfigError(f"{min(clash)}: --k-schedule {self.k_schedule} sets it; drop one of them")
        if self.warmup_tokens is not None and self.limits().unit not in ("steps", "tokens"):
            raise ConfigError(
                f"warmup_tokens: {self.warmup_tokens} has no measure in a run of {self.limits()}; give --warmup as a fraction"
            )
        if self.document_mask and self.packing != "stream":
            raise ConfigError(f"document_mask: {self.packing} packing keeps documents apart already; leave it out")
        if self.max_steps is not None and "num_tokens" in given and self.max_steps != self.steps_of_tokens():
            raise ConfigError(
                f"max_steps: {self.max_steps}, but --num-tokens {self.num_tokens} makes {self.steps_of_tokens()} updates; drop one of them"
            )
        if self.budget and (clash := given & {"max_steps", "num_tokens"}):
            raise ConfigError(f"{min(clash)}: --budget {self.budget!r} sets the length already; give another --budget, or drop one of them")

        if self.dynamic_data_selection == "none":
            for name in sorted(given):
                if name == "reference_loss" or name in DYNAMIC:
                    raise ConfigError(
                        f"{name}: {getattr(self, name)} is used by --dynamic-data-selection only; choose a rule, or leave it out"
                    )
        elif self.eval_every == "never":
            raise ConfigError("eval_every: never, but --dynamic-data-selection moves shares after evaluations; give an interval")
        if self.dynamic_min_weight > self.dynamic_max_weight:
            raise ConfigError(
                f"dynamic_min_weight: {self.dynamic_min_weight} is above --dynamic-max-weight {self.dynamic_max_weight}; exchange them"
            )

    def devices(self) -> int:
        """Processes of the run: those named, else those of the launcher."""
        return devices(self.num_nodes, self.num_gpu_per_node, self.num_processes)

    def tokens_per_batch(self) -> int:
        return self.micro_batch_size * self.accumulate * self.devices() * self.max_length

    def held_out_tokens_used(self) -> int:
        return int(self.held_out_tokens)

    def steps_of_tokens(self) -> int:
        """Whole updates in `num_tokens`. Raises ConfigError when there is none."""
        steps = steps_of_tokens(int(self.num_tokens), self.tokens_per_batch())
        if steps == 0:
            raise ConfigError(f"num_tokens: {self.num_tokens} is less than one batch of {self.tokens_per_batch()} tokens; give more")
        return steps

    def limits(self) -> Budget:
        if self.budget:
            return Budget.parse(self.budget)
        steps = self.max_steps or self.steps_of_tokens()
        if self.max_train_samples is not None:
            batch = self.tokens_per_batch() // self.max_length
            if self.max_train_samples < batch:
                raise ConfigError(f"max_train_samples: {self.max_train_samples} is less than one batch of {batch} samples; give more")
            steps = min(steps, int(self.max_train_samples) // batch)
        return Budget({"steps": steps})

    def plan(self) -> Plan:
        """Updates and batch in numbers. Raises ConfigError for a budget that only the data or the clock turns into updates."""
        limits = self.limits().limits
        batch = self.tokens_per_batch() // self.max_length
        per_step = {"steps": 1, "samples": batch, "tokens": self.tokens_per_batch()}
        if unknown := limits.keys() - per_step.keys():
            raise ConfigError(
                f"budget: {self.budget!r} is not a number of updates before the run; use steps, samples or tokens, not {min(unknown)}"
            )
        steps = min(math.ceil(limit / per_step[unit]) for unit, limit in limits.items())
        return Plan(steps, batch, self.tokens_per_batch())

    def eval_steps(self) -> int | None:
        """Steps between evaluations, None for never or an interval in epochs."""
        every = Every.parse(self.eval_every, "eval_every")
        return every.steps or (max(1, round(every.fraction * self.plan().max_steps)) if every.fraction else None)

    def learning_rate(self, progress: Progress, size: Size, epoch_samples: int) -> float:
        """core's shapes, and the clipped cosine."""
        clipped = self.schedule == "cosine" and self.lr_floor_style == "clipped"
        return learning_rate(self, self.limits(), progress, size, epoch_samples, clipped_cosine if clipped else None)


def devices(num_nodes: int | None, num_gpu_per_node: int | None, num_processes: int) -> int:
    """Processes of a run: those of its plan, else those that the launcher started or the command will start."""
    if num_nodes is None and num_gpu_per_node is None:
        return int(os.environ.get("WORLD_SIZE", num_processes))
    return (num_nodes or 1) * (num_gpu_per_node or 1)


def tokens_of_step(cls: type, values: Mapping[str, Any]) -> int:
    """Tokens of one update by options as they were written, those of `cls` where there are none."""
    size = {name: right(int | None, values[name]) if name in values else cls.__dataclass_fields__[name].default for name in SIZES_OF_STEP}  # type: ignore[attr-defined]
    machines = devices(size["num_nodes"], size["num_gpu_per_node"], size["num_processes"] or 1)
    return max(1, (size["micro_batch_size"] or 1) * (size["accumulate"] or 1) * machines * (size["max_length"] or 1))


@config
class PlanConfig(TrainConfig):
    """What a run would do, before it starts."""

    seconds_per_step: float | None = opt(None, "Seconds of one update, to tell the hours of the run.", gt=0)
    logdir: Path | None = opt(None, "Folder of an earlier run of the same kind, whose speed tells the hours of this one.")

    def check(self) -> None:
        if self.seconds_per_step is not None and self.logdir is not None:
            raise ConfigError(f"logdir: {self.logdir} and --seconds-per-step {self.seconds_per_step} both tell the speed; drop one of them")


@config
class SFTConfig(TrainConfig):
    """Supervised tuning of a mixture on conversations."""

    data: list[str] = change(
        TrainConfig,
        "data",
        help="Conversations, repeatable or a comma list: .jsonl files whose rows hold conversations, or builtin:python-docs (a title, then its text).",
        flags=("--dataset_dir_or_path", "--dataset_dir"),
    )
    max_length: int = change(TrainConfig, "max_length", flags=("--model_max_length", "--block_size"))
    lr: float = change(TrainConfig, "lr", default=2e-5)
    warmup: Count = change(TrainConfig, "warmup", default=0.03, flags=("--warmup_ratio", "--warmup_steps"))
    num_train_epochs: Count = opt(2, "Passes over the data, unless --max-steps or --budget is given.", gt=0)

    def check(self) -> None:
        if self.dynamic_data_selection != "none" or self.prob_map is not None:
            raise ConfigError("prob_map: conversations are used as often as they are; leave out --prob-map and --dynamic-data-selection")
        if "num_tokens" in explicit(self):
            raise ConfigError(f"num_tokens: {self.num_tokens} is for train; give --num-train-epochs, --max-steps or --budget")

    def limits(self) -> Budget:
        if self.budget:
            return Budget.parse(self.budget)
        return Budget({"steps": self.max_steps} if self.max_steps else {"epochs": self.num_train_epochs})
