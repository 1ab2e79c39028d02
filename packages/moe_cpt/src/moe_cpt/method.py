"""Continued pre-training: next-token loss, and a balance loss that moves the routers but not the loss that is reported."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from kernels_cuda.head import linear_cross_entropy
from lm_core import dist
from lm_core.errors import ConfigError, ResumeRefused, RunFailed
from lm_core.estimate import Memory, peak_flops
from lm_core.method import IGNORE, Batch, Loss, Method, Rule
from lm_core.models import CausalLoss, checkpoint_activations, load_model, model_folder, quiet
from lm_core.unbuilt import without_values
from moe_cpt.adapters import adapted, from_adapter
from moe_cpt.config import TrainConfig
from moe_cpt.convert import convert, moe_config
from moe_cpt.data import weighted_sources
from moe_cpt.hf.configuration_llama_moe import CALCULATORS, GATES, LlamaMoEConfig
from moe_cpt.model import LlamaMoEForCausalLM
from moe_cpt.models import PRESETS, first_layers
from moe_cpt.plan import hours_of, parameter_counts
from moe_cpt.report import Meter, RouterSink
from moe_cpt.routing import Routing, balance_loss
from moe_cpt.schedule import parse_k_schedule
from moe_cpt.split import FILE, split_ffn
from moe_cpt.tensors import read_config
from moe_cpt.weights import read_reference, update_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_core.data import Data
    from lm_core.data.loader import Loader
    from lm_core.evaluate import Scores
    from lm_core.sinks import Sink

logger = logging.getLogger(__name__)

# L layers, N experts

# the budget in other words, the shape of the rest of the schedule, what the plan only reports, and the leave for changes of the data
RESUMABLE = frozenset(
    {
        "num_tokens",
        "max_steps",
        "lr_floor_style",
        "num_nodes",
        "num_gpu_per_node",
        "experts_backend",
        "max_train_samples",
        "report_to",
        "warmup_tokens",
        "data_cache_dir",
        "held_out_tokens",
        "allow_data_change",
    }
)
# updates after which the speed of a run tells when it ends
SETTLED = 20
DATA_CHANGES = frozenset({"data", "prob_map", "reference_loss", "max_length", "seed", "global_batch_size"})


class MoeCPT(Method):
    """One model and one loss. The gates of all layers report through a `Routing` that travels with the batch."""

    config: TrainConfig

    @property
    def resumable(self) -> frozenset[str]:  # type: ignore[override]
        """What may always differ, and what --allow-data-change lets differ; shares that moved with the losses stay even so."""
        if not self.config.allow_data_change:
            return RESUMABLE
        return RESUMABLE | DATA_CHANGES | ({"weights"} if self.config.dynamic_data_selection == "none" else set())

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self._step_so_far = StepSums()
        self._meter = Meter()
        self._sources: list[str] = []
        self._flops_per_token = 0.0
        self._device = torch.device("cpu")
        self._reference: dict[str, float] = {}
        self._updates = 0
        self._selections = [] if config.k_schedule is None else parse_k_schedule(config.k_schedule)
        self._mixture: LlamaMoEForCausalLM | None = None
        self._words: PreTrainedTokenizerBase | None = None
        self._foretold = False

    def build(self) -> nn.Module:
        config = self.config
        if torch.get_default_device().type == "meta":
            model = LlamaMoEForCausalLM(self.model_config()).train()
        else:
            with self.initial_model() as name:
                loaded = self.loaded(name)
            model = cast(LlamaMoEForCausalLM, self.require_mixture(loaded))
        self.override(model)
        self._mixture = model
        self.select(0)
        try:
            model.set_attn_implementation(config.attn_implementation)
        except (ImportError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"attn_implementation: {config.attn_implementation} cannot be had here ({reason}); use sdpa") from None
        module = CausalLoss(self.adapted(model) if config.mode == "lora" else model, loss=linear_cross_entropy)
        if config.gradient_checkpointing:
            checkpoint_activations(module)
        return module

    def loaded(self, name: str) -> PreTrainedModel:
        """The model of that name; under --debug-mode its first layers."""
        model = load_model(name, presets=PRESETS, seed=self.config.seed)
        if self.config.debug_mode:
            inner, size = cast(Any, model.model), getattr(model.config, "stored_size", 0)
            for field, value in first_layers(model.config.to_dict()).items():
                setattr(model.config, field, value)
            if getattr(model.config, "stored_size", 0) != size or getattr(model.config, "converted", [0]) == []:
                raise ConfigError(
                    f"debug_mode: the first layers of {name} are no smaller mixture of their own (dense, or with other sizes); leave it out"
                )
            inner.layers = inner.layers[: model.config.num_hidden_layers]
        return model

    def adapted(self, model: LlamaMoEForCausalLM) -> nn.Module:
        """The mixture with the adapters that the options name."""
        config = self.config
        if config.peft_path is not None:
            return cast(nn.Module, from_adapter(model, config.peft_path))
        found: nn.Module = adapted(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            trainable=names_in(config.trainable),
            modules_to_save=names_in(config.modules_to_save),
            freeze_router=config.freeze_router,
        )
        return found

    def require_mixture(self, model: nn.Module) -> nn.Module:
        if isinstance(model, LlamaMoEForCausalLM):
            return model
        raise ConfigError(
            f"model: {self.config.model} is a {model.config.model_type} model, not a mixture of experts; add --from-dense random, or convert it"  # type: ignore[union-attr]
        )

    def model_config(self) -> LlamaMoEConfig:
        """The mixture's config without its weights."""
        name = self.config.model
        stored = dict(PRESETS[name]) if name in PRESETS else read_config(model_folder(name))
        config, kind = self.config, stored.get("model_type")
        if config.model_type not in (None, kind):
            raise ConfigError(f"model_type: {config.model_type}, but {config.model} is a {kind}; name the other type, or another model")
        if config.debug_mode:
            stored |= first_layers(stored)
        if config.from_dense == "none":
            return LlamaMoEConfig(**{key: value for key, value in stored.items() if key != "model_type"})
        return moe_config(
            stored,
            num_experts=config.num_experts,
            num_selects=config.num_selects or 4,
            gate_network=config.gate_network,
            gate_type=config.gate_type or GATES[0],
            calculator_type=config.calculator_type or CALCULATORS[0],
        )

    @contextmanager
    def initial_model(self) -> Iterator[str]:
        """What the run starts from: --model, or the folder of its conversion, made unless the run is resumed. A dry run leaves nothing behind."""
        config = self.config
        if config.from_dense == "none":
            yield config.model
        elif config.dry_run:
            temporary = dist.on_main(tempfile.mkdtemp)
            try:
                dist.on_main(self._convert, Path(temporary, "init"))
                yield f"{temporary}/init"
            finally:
                dist.on_main(shutil.rmtree, temporary)
        else:
            folder = config.run_folder() / "init"
            if config.resume == "none" or not dist.on_main(folder.exists):
                dist.on_main(self._convert, folder)
            yield str(folder)

    def _convert(self, folder: Path) -> None:
        config = self.config
        with tempfile.TemporaryDirectory() as temporary:
            if config.model in PRESETS or config.debug_mode:
                source = Path(temporary)
                with quiet():
                    self.loaded(config.model).save_pretrained(source)
            else:
                source = model_folder(config.model)
            split = split_ffn(source, config.from_dense, num_experts=config.num_experts, seed=config.seed)
            convert(
                source,
                split,
                folder,
                num_selects=config.num_selects or 4,
                gate_network=config.gate_network,
                gate_type=config.gate_type or GATES[0],
                calculator_type=config.calculator_type or CALCULATORS[0],
                seed=config.seed,
                overwrite=True,
            )

    def write_beside(self, checkpoint: Path) -> None:
        """The tokenizer and the split: a checkpoint can then be evaluated, exported and put back into a dense model."""
        if self._words is not None:
            self._words.save_pretrained(checkpoint)
        self._copy_split(checkpoint)

    def keep_split(self) -> None:
        """Copy the split beside the trained weights, so that they can be put back into a dense model."""
        if dist.rank() == 0 and not self.config.dry_run:
            self._copy_split(self.config.run_folder() / "final")

    def _copy_split(self, target: Path) -> None:
        config = self.config
        source = Path(config.model) if config.from_dense == "none" else config.run_folder() / "init"
        whole = config.from_dense != "none" or not config.debug_mode
        if whole and (source / FILE).is_file():
            shutil.copy2(source / FILE, target / FILE)

    def override(self, mixture: LlamaMoEForCausalLM) -> None:
        """Routing options that were given win over the checkpoint's; says where each value comes from."""
        config, model = self.config, mixture.config
        for name in ("gate_type", "calculator_type", "num_selects", "gate_balance_loss_weight"):
            given = getattr(config, name)
            origin = "checkpoint" if given is None else "option"
            if given is not None:
                setattr(model, name, given)
            logger.info("%s: %s (%s)", name, getattr(model, name), origin)
        if config.score_scale_factor is not None:
            mixture.set_score_scale_factor(config.score_scale_factor)
        logger.info(
            "score_scale_factor: %s (%s)", model.score_scale_factor, "checkpoint" if config.score_scale_factor is None else "option"
        )
        model.balance_scope, model.experts_backend = config.balance_scope, config.experts_backend
        try:
            LlamaMoEConfig(**model.to_dict())
        except ValueError as error:
            raise ConfigError(str(error)) from None
        mixture.fit_router()
        if wrong := [entry for entry in self._selections if entry.num_selects > model.num_experts]:
            raise ConfigError(f"k_schedule: {wrong[0].num_selects} of {model.num_experts} experts; use 1 to {model.num_experts}")
        usual = model.num_experts / model.num_selects
        if model.multiply_gate_scores and model.score_scale_factor != usual and config.k_schedule is None:
            logger.warning(
                "score_scale_factor: %s is not experts / selected experts = %g; give --score-scale-factor %g unless it was calibrated",
                model.score_scale_factor, usual, usual,
            )  # fmt: skip
        if config.max_length > model.max_position_embeddings:
            raise ConfigError(
                f"max_length: {config.max_length} is beyond the {model.max_position_embeddings} positions of {config.model}; use at most {model.max_position_embeddings}"
            )

    def select(self, step: int) -> None:
        """Select as many experts as --k-schedule says for a step."""
        due = [entry for entry in self._selections if entry.step <= step]
        if due and self._mixture is not None and due[-1].num_selects != self._mixture.config.num_selects:
            logger.info("k_schedule: %d experts, factor %g from step %d on", due[-1].num_selects, due[-1].scale, due[-1].step)
            self._mixture.set_num_selects(due[-1].num_selects)
        if due and self._mixture is not None:
            self._mixture.set_score_scale_factor(due[-1].scale)

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        """Sum of cross entropies plus b - stop_gradient(b): the value is that of the cross entropy, the gradient that of both."""
        inputs = {name: batch[name] for name in ("input_ids", "labels", "attention_mask", "position_ids") if name in batch}
        if self._selections and model.training:
            self.select(batch.step)
        routing = Routing(index=batch.index, mask=batch.get("attention_mask"), seed=self.config.seed)
        total = model(**inputs, routing=routing)
        importance_LN = routing.sums("importance_N")
        if not importance_LN.is_meta:
            _require_finite(importance_LN, batch.step)
        if not model.training:
            self._meter.pause()
            yield Loss(total=total)
            return
        if not importance_LN.is_meta:
            self._meter.add(batch, self.tokens(batch), routing, len(self._sources))
            self._device = batch["labels"].device
        load_LN, targets = routing.sums("load_N"), (batch["labels"] != IGNORE).sum()
        config = self.mixture(model)
        scale = targets
        if self.config.balance_scope == "global" and not importance_LN.is_meta:
            importance_LN, load_LN, scale = self._step_so_far.add(batch, importance_LN, load_LN, targets)
        balance = balance_loss(importance_LN, load_LN, config.balance_weight, config.gate_type == "SwitchBalancedGate")
        moving = scale * balance
        yield Loss(total=total + moving - moving.detach(), metrics={"moe/balance_loss": targets * balance.detach()})

    def data(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        """The weighted sources. Raises ConfigError when shares are to follow losses that some source has not."""
        self._words = tokenizer
        entries = self.model_config().vocab_size
        if len(tokenizer) > entries:
            raise ConfigError(
                f"tokenizer: {len(tokenizer)} entries, but {self.config.model} embeds {entries}; name the tokenizer the model was trained with"
            )
        data = weighted_sources(self.config, tokenizer)
        self._sources = list(data.train)
        if self.config.dynamic_data_selection != "none":
            if unscored := [name for name in data.train if name not in data.valid]:
                raise ConfigError(f"eval_data: source {unscored[0]} has no held-out data to move its share by; add some under that name")
            self._reference = read_reference(self.config.reference_loss, data.train)
            # below 1 / n each source has its bound, above it none could
            if not self.config.dynamic_min_weight * len(data.train) <= 1 <= self.config.dynamic_max_weight * len(data.train):
                raise ConfigError(
                    f"dynamic_min_weight: shares of {len(data.train)} sources within {self.config.dynamic_min_weight} and "
                    f"{self.config.dynamic_max_weight} cannot sum to 1; widen the bounds"
                )
        return data

    def after_eval(self, scores: Scores, data: Loader) -> None:
        """Move the source weights by their excess loss; a loss that is not finite leaves them as they are."""
        config = self.config
        if config.dynamic_data_selection == "none":
            return
        losses = {name: scores[name].loss for name in data.weights}
        if not all(math.isfinite(loss) for loss in losses.values()):
            logger.warning("source weights kept: a held-out loss is not finite (%s)", losses)
            return
        weights = update_weights(
            data.weights,
            losses,
            self._reference,
            config.dynamic_data_selection,
            config.dynamic_eta,
            config.dynamic_smoothing,
            config.dynamic_min_weight,
            config.dynamic_max_weight,
        )
        for name, weight in weights.items():
            if weight in (config.dynamic_min_weight, config.dynamic_max_weight):
                logger.info("source %s is held at %g", name, weight)
        data.set_weights(weights)
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """How often the source weights moved, and by which losses; the weights themselves are the loader's."""
        state: dict[str, Any] = {"updates": self._updates, "reference": self._reference}
        if self._selections and self._mixture is not None:
            state["selects"] = self._mixture.config.num_selects
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["reference"] != self._reference:
            if not self.config.allow_data_change:
                raise ResumeRefused("reference_loss: other losses than those of the checkpoint; give the same file, or start a new run")
            logger.warning("reference_loss: %s from here on; the checkpoint was made with %s", self._reference, state["reference"])
        self._updates = state["updates"]
        # what an evaluation before the next step uses
        for entry in self._selections:
            if entry.num_selects == state.get("selects"):
                self.select(entry.step)

    def measured(self) -> dict[str, float]:
        peak = self.config.flops_per_device
        known = peak_flops(self._device, self.config.precision) if peak == "auto" else peak
        values = self._meter.flush(self._sources, self._flops_per_token, known)
        steps, done = int(self.config.limits().limits.get("steps", 0)), self._meter.last_step + 1
        if not self._foretold and SETTLED <= done < steps and "speed/seconds_per_step" in values:
            logger.info("ETA: %s", hours_of(steps - done, values["speed/seconds_per_step"]))
            self._foretold = True
        return values

    def sinks(self, folder: Path) -> list[Sink]:
        return [RouterSink(self._meter, folder)]

    def mixture(self, model: nn.Module) -> LlamaMoEConfig:
        return cast(LlamaMoEConfig, self.hf_model(model).config)

    def param_rules(self) -> list[Rule]:
        frozen = [Rule(r"\.router\.", trained=False)] if self.config.freeze_router else []
        return [*frozen, Rule(r"\.router\.noise\.", weight_decay=0.0)]

    def flops_per_token(self, model: nn.Module) -> float:
        """6 per active parameter, and 12 per layer, channel and position for attention."""
        config = self.mixture(model)
        active = parameter_counts(config.to_dict()).active
        self._flops_per_token = float(6 * active + 12 * config.num_hidden_layers * config.hidden_size * self.config.max_length)
        return self._flops_per_token


class StepSums:
    """Importance, load and targets of the micro-batches of the step so far, over all ranks."""

    def __init__(self) -> None:
        self._step, self._last_sample = -1, -1
        self._sums: Tensor | None = None

    def add(self, batch: Batch, importance_LN: Tensor, load_LN: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three sums with this micro-batch; the parts of earlier micro-batches and other ranks are constants."""
        first = int(batch.index[0])
        # samples count up within a step, so one that does not starts a step anew
        if batch.step != self._step or first <= self._last_sample:
            self._sums = None
        self._step, self._last_sample = batch.step, first
        mine = torch.stack([importance_LN, load_LN]).detach()
        flat = torch.cat([mine.flatten(), targets[None].to(mine.dtype)])
        everyone = dist.all_sum(flat)
        self._sums = everyone if self._sums is None else self._sums + everyone
        others = self._sums[:-1].view(mine.shape) - mine
        return importance_LN + others[0], load_LN + others[1], self._sums[-1]


def planned_memory(config: TrainConfig) -> Memory | None:
    """Bytes of a process that holds the whole model, without its weights; None for adapters on experts, which peft cannot run without values."""
    ids = torch.zeros(config.micro_batch_size, config.max_length, dtype=torch.long)
    batch = Batch({"input_ids": ids, "labels": ids}, index=torch.arange(config.micro_batch_size), step=0)
    found = without_values(config, MoeCPT(config), batch, torch.device("cpu"))
    return None if found is None else found[0]


def names_in(text: str) -> list[str]:
    """The names of a comma list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _require_finite(importance_LN: Tensor, step: int) -> None:
    finite = importance_LN.detach().isfinite().all(1)
    if not bool(finite.all()):
        layer = int((~finite).nonzero()[0])
        raise RunFailed(
            f"router: the logits of layer {layer} are not finite in step {step}; lower --lr, or resume from an earlier checkpoint"
        )
