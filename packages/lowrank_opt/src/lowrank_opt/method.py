"""Next-token training with little memory: adapters, projected gradients, or plain AdamW as the baseline."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kernels_cuda.head import linear_cross_entropy
from lm_core import dist
from lm_core.config import leaves
from lm_core.data.vocab import build_tokenizer
from lm_core.deepspeed_settings import engine_kind
from lm_core.errors import ConfigError
from lm_core.memory import current_bytes
from lm_core.method import Batch, Loss, Method
from lm_core.models import CausalLoss, checkpoint_activations, hf_model, load_model, lora, merged
from lowrank_opt.base import BaseOptimizer, Group
from lowrank_opt.choose import low_rank_settings, make_optimizer
from lowrank_opt.config import TrainConfig
from lowrank_opt.csv_sink import CsvSink
from lowrank_opt.groups import auto_targets, matching
from lowrank_opt.int8 import to_dense, to_int8
from lowrank_opt.layerwise import attach_per_layer
from lowrank_opt.matrix import reaches_full_rank
from lowrank_opt.models import HUB_MODELS, PRESETS, default_tokenizer, weights_of
from lowrank_opt.optimizer_options import LOW_RANK, PROJECTED, GaloreOptions, LoraOptions, moment_bits
from lowrank_opt.resolve import again

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lm_core.data import Data
    from lm_core.engine import Engine
    from lm_core.sinks import Sink

log = logging.getLogger("lowrank_opt")


# what a fresh optimizer may change, beside the sections of options that only optimizers read
OF_THE_OPTIMIZER = frozenset({
    "optimizer", "betas", "eps", "weight_decay", "grad_clip", "clip_mode", "per_layer", "stochastic_rounding", "tmax", "tmax_unit", "restart_every",
})  # fmt: skip


def method_for(config: TrainConfig) -> LowRank:
    """The method that `config` means: next tokens, or one label per text."""
    if not config.classifies():
        return LowRank(config)
    from lowrank_opt.glue import Classifier

    return Classifier(config)


class LowRank(Method):
    """One model, one loss; the optimizers differ in which parameters are trained, and how."""

    config: TrainConfig
    # the budget in other words; the content of the JSON files is compared option by option
    resumable = frozenset({
        "max_steps", "num_epochs", "num_training_tokens", "total_batch_size", "csv", "lora_config", "galore_config",
        "resume_reset_optimizer", "verify_replicas_every", "shard_optimizer",
    })  # fmt: skip
    low_rank: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    module: nn.Module
    built: BaseOptimizer
    said = ""
    words: PreTrainedTokenizerBase | None = None
    rows: Data | None = None

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        if config.resume_reset_optimizer:
            sections = {leaf.path for leaf in leaves(TrainConfig) if leaf.path.startswith(("galore.", "apollo.", "ldadam."))}
            self.fresh_optimizer = True
            self.resumable = self.resumable | OF_THE_OPTIMIZER | (sections - {"galore.weight_dtype"})

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.words is None:
            path = self.config.model_path
            name = self.config.tokenizer or (None if path is None else str(path)) or default_tokenizer(self.config.model)
            self.words = build_tokenizer(again(self.config, tokenizer=name))
        return self.words

    def data(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        self.rows = self.read(tokenizer)
        return self.rows

    def read(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        """The data of the run."""
        if self.config.streaming:
            from lowrank_opt import streaming

            return streaming.build(self.config, tokenizer)
        return super().data(tokenizer)

    def build(self) -> nn.Module:
        config = self.config
        model = self.load(torch.bfloat16 if config.weights_dtype() == "bf16" else torch.float32)
        if config.model_path is not None:
            check_size(config, model.config)
        limit = getattr(model.config, "max_position_embeddings", None)
        if model.config.model_type == "roberta" and limit is not None:
            # positions are counted from the padding id on
            limit -= 2
        if self.words is not None and len(self.words) > model.config.get_text_config().vocab_size:
            raise ConfigError(
                f"tokenizer: it has {len(self.words)} entries, and {config.model} has {model.config.get_text_config().vocab_size}; "
                "leave --tokenizer out for the model's own, or use bytes or a smaller bpe:N"
            )
        if limit is not None and config.max_length > limit:
            raise ConfigError(f"max_length: {config.max_length} is beyond the {limit} positions of {config.model}; use at most {limit}")
        wrapped: PeftModel | None = None
        if config.optimizer.startswith("lora"):
            chosen = adapter_config(config, model.config.model_type)
            check_adapter_targets(model, chosen["target_modules"])
            wrapped = lora(model, **chosen)
            if self.trains_base():
                train_base_modules(model)
        module = self.wrap(model if wrapped is None else wrapped)
        # later, weights come from a checkpoint
        if wrapped is not None and config.lora.init_lora_weights == "lora_ga" and self.rows is not None and self.begins():
            from lowrank_opt import lora_ga

            lora_ga.initialise(self, module, self.rows, dist.init(config.device))
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.embeddings = frozenset(names[id(part.weight)] for part in module.modules() if isinstance(part, nn.Embedding))
        if config.optimizer in LOW_RANK:
            self.low_rank = low_rank_names(module, config.galore)
        if config.optimizer == "qgalore" and config.galore.weight_dtype == "int8":
            rank, weights = config.galore.rank, dict(module.named_parameters())
            settings = {"rank": rank if rank < 1 else int(rank)}
            to_int8(module, sorted(name for name in self.low_rank if not reaches_full_rank(settings, weights[name])))
        if config.gradient_checkpointing:
            checkpoint_activations(module)
        self.module = module
        return module

    def begins(self) -> bool:
        """Whether training starts here, with weights that no checkpoint replaces."""
        from lm_core import checkpoint

        config = self.config
        resumes = config.resume != "none" and (config.resume != "auto" or checkpoint.latest(config.run_folder()) is not None)
        return not (config.dry_run or resumes or torch.get_default_device().type == "meta")

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model before adapters and losses."""
        return load_model(**self.source(), seed=self.config.seed, dtype=dtype)

    def source(self) -> dict[str, Any]:
        """What core's loaders need to know: the name, the sizes that have one, and whether weights are trained."""
        config = self.config
        random, path = config.random_init(), None if config.model_path is None else str(config.model_path)
        # sizes need no file
        if config.model in HUB_MODELS and path is None and (random or torch.get_default_device().type == "meta"):
            return {"name": config.model, "presets": {**PRESETS, **HUB_MODELS}, "init": "random"}
        return {"name": weights_of(config.model, path), "presets": PRESETS, "init": "random" if random else "pretrained"}

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to train around the model, with its adapters if any."""
        return CausalLoss(model, loss=linear_cross_entropy)

    def trains_base(self) -> bool:
        """Whether embeddings, norms and head are trained beside the adapters."""
        return (
            self.config.optimizer.startswith("lora") and self.config.mode == "pretraining" and self.config.lora.train_base_modules == "auto"
        )

    def final_model(self, model: nn.Module) -> PreTrainedModel:
        """The trained model, or its adapter; adapters are merged where their base exists nowhere else: in pretraining, where they
        were taken out of the weights at first, and where earlier ones are part of the weights."""
        config = self.config
        changed = config.lora.init_lora_weights.startswith(("lora_ga", "pissa", "olora")) or config.lora.relora_every
        if config.optimizer.startswith("lora") and (config.mode == "pretraining" or changed):
            return merged(model)
        found = super().final_model(model)
        if config.galore.weight_dtype == "int8":
            found = copy.deepcopy(found)
            to_dense(found)
        return found

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        inputs = {name: batch[name] for name in ("input_ids", "labels", "attention_mask", "position_ids") if name in batch}
        yield Loss(total=model(**inputs))

    def engine(self, model: nn.Module, device: torch.device) -> Engine | None:
        config = self.config
        shares = config.optimizer in PROJECTED and dist.world() > 1 and engine_kind(config) == "replicated"
        if not (config.engine == "lowrank" or config.verify_replicas_every or config.shard_optimizer or shares):
            return None
        from lowrank_opt import engine

        kind = engine.LowRankReduction if config.engine == "lowrank" else engine.Replicas
        return kind(config, self, model, device)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        parts = [part for group in groups for part in self.split(group)]
        self.built = make_optimizer(self.config, parts)
        if self.config.lora.relora_every:
            from lowrank_opt import relora

            relora.attach(self.built, self.module, self.config.lora.relora_every, self.config.seed)
        if (text := self.summary(parts)) != self.said:
            # a dry run makes the optimizer twice
            log.info("%s", text)
            self.said = text
        if self.config.per_layer:
            clip = self.config.grad_clip or None
            mode = "per_param" if self.config.clip_mode == "per_param" else "delayed"
            attach_per_layer(self.built, self.module, self.config.accumulate, clip, mode)
        return self.built

    def summary(self, parts: list[Group]) -> str:
        """How many parameters get a low-rank update, a dense one and none, and the exact size of the optimizer's state."""
        trained = [parameter for part in parts for parameter in part["params"]]
        low = [parameter for part in parts if part.get("rank") for parameter in part["params"]]
        frozen = sum(parameter.numel() for parameter in self.module.parameters()) - sum(parameter.numel() for parameter in trained)
        numbers = f"low-rank {sum(p.numel() for p in low):,} ({len(low)} matrices)  "
        numbers += f"dense {sum(p.numel() for p in trained) - sum(p.numel() for p in low):,}  frozen {frozen:,}"
        if low and engine_kind(self.config) == "sharded":
            numbers += "  proj_type right, since every process has some rows of each"
        return f"optimizer   {numbers}  state {self.built.predicted_state_bytes():,} bytes"

    def sinks(self, folder: Path) -> list[Sink]:
        def memory() -> tuple[int, int]:
            device = next(self.module.parameters()).device
            if device.type == "cuda":
                return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
            return (current_bytes(device),) * 2

        def refreshes() -> int:
            return self.built.refreshes_elsewhere + int(sum(state.get("refreshes", 0) for state in self.built.state.values()))

        return [CsvSink(folder / self.config.csv, memory, refreshes, lambda: getattr(self.built, "grad_norm_kind", "full"))]

    def split(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The low-rank part, the embeddings and the rest of a parameter group, each in the order of the model."""
        settings = low_rank_settings(self.config)
        embeddings = {"rank": None, "state_bits": self.config.galore.embedding_state_bits} if moment_bits(self.config) == 8 else {}
        for names, more in ((self.low_rank, settings), (self.embeddings, embeddings), (None, {"rank": None} if settings else {})):
            taken = self.low_rank | self.embeddings
            pairs = [(n, p) for n, p in zip(group["names"], group["params"]) if (n not in taken if names is None else n in names)]
            if pairs:
                chosen, params = zip(*pairs)
                yield {**group, "params": list(params), "names": list(chosen), **more}


def low_rank_names(module: nn.Module, options: GaloreOptions) -> frozenset[str]:
    """Names of the trained matrices that are projected. Raises ConfigError for a pattern that matches none."""
    names = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if options.target_modules == ["auto"]:
        targets = set(auto_targets(hf_model(module)))
    else:
        targets = set(matching(names, "target_modules", options.target_modules))
    targets -= set(matching(names, "exclude_modules", options.exclude_modules))
    return frozenset(name for parameter, name in names.items() if parameter in targets)


def train_base_modules(model: PreTrainedModel) -> None:
    """Unfreeze embeddings, norms and the output head; they are small, and adapters cannot stand in for them."""
    head: Any = model.get_output_embeddings  # transformers leaves it without types
    for part in [head(), *(part for part in model.modules() if isinstance(part, nn.Embedding))]:
        part.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name:
            parameter.requires_grad_(True)


def check_size(config: TrainConfig, found: PretrainedConfig) -> None:
    """Refuse weights of another size than the one that is named."""
    for key, wanted in {**PRESETS, **HUB_MODELS}[config.model].items():
        if isinstance(wanted, int) and not key.endswith("_token_id") and getattr(found, key, wanted) != wanted:
            raise ConfigError(
                f"model_path: {config.model_path} has {key} {getattr(found, key)}, {config.model} has {wanted}; write --model {config.model_path}"
            )


def check_adapter_targets(model: nn.Module, targets: list[str] | str) -> None:
    """Refuse names that no linear layer of the model ends in, and a regular expression that is none or is no layer's whole name."""
    if targets == "all-linear":
        return
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"]
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            pattern = re.compile(targets if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}")
        except re.error as error:
            raise ConfigError(
                f"lora.target_modules: {target!r} is no regular expression ({error}); write for example .*[qv]_proj"
            ) from error
        if not any(pattern.fullmatch(name) for name in linear):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise ConfigError(
                f"lora.target_modules: no linear layer of this model is called {target}; choose from {known}, or all-linear, "
                "in lora.target_modules_by_model"
            )


def adapter_config(config: TrainConfig, model_type: str) -> dict[str, Any]:
    """Arguments of peft's LoraConfig; target modules by model name, else by model type, else by mode."""
    options: LoraOptions = config.lora
    by_mode = options.target_modules_pretraining if config.mode == "pretraining" else options.target_modules_finetuning
    by_model = options.target_modules_by_model
    targets = by_model.get(config.model) or by_model.get(model_type) or by_mode
    # of lora_ga later, when there is a gradient
    known = {"true": True, "false": False, "lora_ga": True}
    return {
        "r": options.r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
        "bias": options.bias,
        # its linear layers are transformers' Conv1D, which stores the transposed matrix
        "fan_in_fan_out": model_type == "gpt2",
        "init_lora_weights": known.get(options.init_lora_weights, options.init_lora_weights),
        # all-linear, and regular expressions on whole names, stand alone
        "target_modules": targets[0] if len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]) else targets,
        # peft then trains and saves the head as well
        **({"task_type": "SEQ_CLS" if options.train_base_modules == "auto" else None} if config.classifies() else {}),
    }
