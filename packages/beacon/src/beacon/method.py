"""Training of beacons: a frozen backbone reads text through memory and learns what to keep of each window."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from beacon import backbone
from beacon.attach import attach_beacon, set_beacon
from beacon.config import BeaconConfig
from beacon.data import training_data
from beacon.errors import BackendError
from beacon.io import model_folder, tokenizer_name
from beacon.losses import BeaconLoss
from beacon.modeling.causal_lm import BeaconMixin, RatioRule
from beacon.modeling.weights import is_beacon, without_gradient
from beacon.options import TrainConfig, settings
from beacon.plan import counted_tokens, first_counted
from beacon.positions import override_positions
from beacon.ratios import Rule, choose, training_ratios
from beacon.sizes import PRESETS
from lm_core import dist
from lm_core.data import Data
from lm_core.data.vocab import build_tokenizer
from lm_core.errors import ConfigError
from lm_core.method import IGNORE, Batch, Loss, Method
from lm_core.method import Rule as Training
from lm_core.models import CausalLoss, checkpoint_activations, load_model, lora, merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
EVAL_RATIO = 32


class Beacon(Method):
    """One model, one loss; ratios are drawn per step and compaction."""

    config: TrainConfig
    # the budget in other words, and how the same numbers are computed
    resumable = frozenset(
        {"max_steps", "num_train_epochs", "beacon_engine", "eval_beacon_ratio", "eval_beacon_ratio_mix", "save_format"}
        | {"eval_max_length", "eval_min_length", "max_eval_num", "eval_method"}
    ) | frozenset({"save_strategy", "evaluation_strategy", "report_to", "cpu", "attn_impl", "num_proc", "prefill_block_windows"})
    module: BeaconLoss
    model: Any  # inside the module
    settings: BeaconConfig
    warned = False
    told = False
    dropped = 0
    words: PreTrainedTokenizerBase | None = None  # of answers that are scored

    def build(self) -> nn.Module:
        folder = model_folder(self.config.model)
        if folder != self.config.model:
            log.info("model: %s", folder)
        model: Any = backbone.load(self.config, folder)
        override_positions(model, self.config)
        if not self.config.enable_beacon:
            return self._plain(model)
        if isinstance(model, BeaconMixin):
            set_beacon(model, settings(self.config, model.beacon))
        else:
            model = attach_beacon(model, settings(self.config, None))
        for parameter in model.beacon_state_dict(keep_vars=True).values():
            # trained weights are float32 masters
            parameter.data = parameter.data.float()
        self.settings = model.beacon
        # these fail here, before any step: no ratio can teach, evaluations have none, attention has no gradients
        training_ratios(self.settings, 0, 0, 2, model.positions)
        self.evaluated()
        if self.settings.attn_backend == "flex" and (self.config.device == "cpu" or not torch.cuda.is_available()):
            raise BackendError("attn_impl: flex has no gradients on a CPU; use auto, or sdpa")
        model.save_format = (self.config.save_format, self.config.model)
        if not self.config.only_train_beacon:
            last = {id(parameter) for parameter in model.trainable_parameters()}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not is_beacon(name) or id(parameter) in last)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.told:
            self._tell_memory(model)
            self.told = True
        self.module = BeaconLoss(self._adapted(model))
        if self.config.distill_weight:
            self.module.distill = (self.config.distill_weight, self.config.distill_temperature)
        self.model = model
        for parameter in trained:
            # peft freezes all but its own
            parameter.requires_grad_(True)
        if self.config.gradient_checkpointing:
            checkpoint_activations(self.module, self.config.use_reentrant)
        return self.module

    def _plain(self, model: Any) -> nn.Module:
        if isinstance(model, BeaconMixin):
            raise ConfigError(f"enable_beacon: false, but {self.config.model} has beacons; name its base model")
        module = CausalLoss(self._adapted(model))
        if self.config.gradient_checkpointing:
            checkpoint_activations(module)
        return module

    def _adapted(self, model: Any) -> Any:
        """`model`, with low-rank adapters on its backbone if they are asked for."""
        if not self.config.lora_tune:
            return model
        for target in self.config.lora_targets:
            if not any(name.endswith(f".{target}") for name, _ in model.named_modules()):
                raise ConfigError(f"lora_targets: no layer of this model is called {target}; choose for example q_proj or down_proj")
        wrapped = lora(
            model,
            r=self.config.lora_rank,
            lora_alpha=self.config.lora_alpha,
            lora_dropout=self.config.lora_dropout,
            target_modules=self.config.lora_targets,
        )
        for part in self.config.lora_extra_params:
            found = [parameter for name, parameter in wrapped.named_parameters() if part in name and "lora_" not in name]
            if not found:
                raise ConfigError(f"lora_extra_params: {part!r} is part of no parameter's name; write for example embed_tokens or norm")
            for parameter in found:
                parameter.requires_grad_(True)
        return wrapped

    def final_model(self, model: nn.Module) -> PreTrainedModel:
        """The trained model; adapters are merged into a copy of it, and beacons beside 4-bit weights go to the base they are of."""
        if self.config.load_in_4_bit:
            trained: Any = self.hf_model(model)
            base: Any = load_model(model_folder(self.config.model), dtype=trained.model.embed_tokens.weight.dtype)
            if not isinstance(base, BeaconMixin):
                base = attach_beacon(base, self.settings)
            set_beacon(base, self.settings)
            base.save_format = trained.save_format
            base.load_beacon_state_dict({name: tensor.cpu() for name, tensor in trained.beacon_state_dict().items()})
            return cast("PreTrainedModel", base)
        if not self.config.lora_tune:
            return super().final_model(model)
        return merged(model)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.config.tokenizer is None and self.config.model not in PRESETS:
            from lm_core.models import load_tokenizer

            return load_tokenizer(tokenizer_name(self.config.model))
        return build_tokenizer(self.config)

    def data(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        found = training_data(self.config, self._known_settings() if self.config.enable_beacon else None, tokenizer, dist.world())
        self.dropped = sum(getattr(rows, "dropped", 0) for rows in found.train.values())
        return found

    def measured(self) -> Mapping[str, float]:
        """Samples of the data that teach nothing, and were left out."""
        return {"data/dropped": float(self.dropped)}

    def _tell_memory(self, model: Any) -> None:
        """Say what a row of the largest length keeps once it is read, beside what there is."""
        from lm_core.unbuilt import available_bytes

        ratios = sorted({ratio for ratio in self.settings.usable() if ratio} or {0})
        attn, length = model.model.layers[0].self_attn, self.config.max_length
        entry = (
            2
            * model.config.num_hidden_layers
            * model.config.num_key_value_heads
            * attn.head_dim
            * model.model.embed_tokens.weight.element_size()
        )
        held = {f"ratio {ratio}": self.settings.held(length, ratio) for ratio in (ratios[0], ratios[-1])}
        told = ", ".join(f"{name} {count * entry / 2**20:.3g}" for name, count in {**held, "full attention": length}.items())
        log.info(
            "keys and values of %d tokens, MiB: %s; %.0f are free", length, told, available_bytes(dist.init(self.config.device)) / 2**20
        )

    def _known_settings(self) -> BeaconConfig:
        """The settings before the model is built: data comes first."""
        stored = backbone.stored(model_folder(self.config.model))
        return settings(self.config, None if stored is None else BeaconConfig.from_dict(stored))

    def param_rules(self) -> list[Training]:
        if self.config.lora_tune or not self.config.enable_beacon:
            # what is frozen stays frozen
            return []
        return [
            Training(without_gradient(self.model.config.num_hidden_layers), trained=False),
            Training(r"\.beacon_"),
            *([Training("", trained=False)] if self.config.only_train_beacon else []),
        ]

    def rule(self, step: int) -> RatioRule:
        """Ratios of a row by its length, in training and in evaluation."""
        positions = self.model.positions
        if self.module.training:
            return lambda length: Rule("list", tuple(training_ratios(self.settings, self.config.seed, step, length, positions)))
        config = self.evaluated()
        return lambda length: choose(config, config.inference_ratio_mix, self.config.seed, length, length, positions)

    def evaluated(self) -> BeaconConfig:
        """The settings of evaluations."""
        ratio = self.config.eval_beacon_ratio or ([EVAL_RATIO] if EVAL_RATIO in self.settings.usable() else [])
        changes = {"ratio": ratio, "inference_ratio_mix": self.config.eval_beacon_ratio_mix}
        return self.settings.changed({name: value for name, value in changes.items() if value})

    def targets(self, batch: Batch) -> int:
        if not self.config.enable_beacon:
            return super().targets(batch)
        labels = batch["labels"]
        mask = batch.get("attention_mask")
        lengths = [labels.shape[1]] * len(labels) if mask is None else (mask != 0).sum(1).tolist()
        rule, training, total = self.rule(batch.step), self.module.training, 0
        documents = self.documents(batch)
        for b, (row, length) in enumerate(zip(labels, lengths)):
            limit = self.settings.compactions(length, training)
            if documents is not None:
                counts = counted_tokens(self.settings, documents[b, :length], rule(length), limit if training else None)
                total += int((row[1:length][counts[:-1]] != IGNORE).sum())
                continue
            ratios = [rule(length)(i) for i in range(limit)]
            first = first_counted(self.settings, length, ratios, training)
            total += int((row[first + 1 : length] != IGNORE).sum())
        return total

    def _answers(self, batch: Batch) -> Tensor:
        from beacon.eval.last_turn import score_last_turns

        if self.words is None:
            self.words = self.tokenizer()
        mask, rule = batch.get("attention_mask"), self.rule(batch.step)
        return score_last_turns(self.model, self.words, batch["input_ids"], batch["labels"], mask, rule)

    def documents(self, batch: Batch) -> Tensor | None:
        """Document of every token, where documents must not see each other."""
        return batch.get("document_ids") if self.settings.doc_mask else None

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        if not self.config.enable_beacon:
            yield Loss(total=model(batch["input_ids"], batch["labels"], batch.get("attention_mask")))
            return
        known = sorted(set(self.settings.usable())) if self.module.training else []
        total, metrics = model(
            batch["input_ids"],
            batch["labels"],
            batch.get("attention_mask"),
            self.documents(batch),
            self.rule(batch.step),
            self.config.beacon_engine,
            tuple(known),
        )
        if not self.warned and bool(metrics["beacon/over_capacity"][0] > 0):
            self.warned = True
            log.warning(
                "some rows reach positions beyond the %d that the model was made for; train on shorter rows or with higher ratios",
                self.model.positions,
            )
        if self.config.eval_method == "generation" and not self.module.training:
            metrics["rouge_l"] = self._answers(batch)
        yield Loss(total=total, metrics=metrics)
