"""Both objectives as one Method of core's loop: the network and the loop are the same, masks and targets differ."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lm_core import dist
from lm_core.cache import kept_in
from lm_core.errors import ConfigError
from lm_core.method import IGNORE, Batch, Loss, Method
from lm_core.models import checkpoint_activations, decoder_layers, load_tokenizer
from mdm_scaling import experiments, flex, losses, sizes
from mdm_scaling.config import SHARED, PretrainConfig
from mdm_scaling.data import rows
from mdm_scaling.model import Scorer, checkpoint_folder, fresh, load_network, warm
from mdm_scaling.noise import Noise, lengths, levels, masks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_core.data import Data
    from lm_core.engine.base import Engine

# B sequences, S positions
_RESUMABLE = (
    "data_cache_dir",
    "num_mc",
    "eval_seed",
    "eval_iters",
    "eval_window",
    "split",
    "override_resume",
    "recipe",
    "recompute",
    "offload_optimizer",
    "offload_param",
    "wandb_mode",
)


class Pretrain(Method):
    """Masked diffusion or next-token prediction with one network."""

    config: PretrainConfig
    # of the whole model, once it is built
    parameters = 0
    # evaluations of one source so far, under --eval-window rolling
    reported = 0

    @property
    def resumable(self) -> frozenset[str]:  # type: ignore[override]
        """Where evaluations draw, how a model is spread over processes, spellings of other options, and what the user lets differ."""
        return frozenset({*SHARED, *_RESUMABLE}) | self.config.overridden

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.config.tokenizer is None and self.config.shape is None:
            return load_tokenizer(checkpoint_folder(self.config.model))
        if self.config.tokenizer is None:
            raise ConfigError("tokenizer: a new network brings none; give --tokenizer bytes, bpe:N (trained from the data), or a folder")
        return super().tokenizer()

    @cached_property
    def vocabulary(self) -> int:
        """Entries of the tokenizer."""
        return len(self.tokenizer())

    @cached_property
    def end(self) -> int:
        """The end-of-document token."""
        end = self.tokenizer().eos_token_id
        if end is None:
            raise ConfigError("reset_attention_mask: the tokenizer has no end-of-document token; use another --tokenizer")
        return int(end)

    def data(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        self.vocabulary = len(tokenizer)
        with kept_in(self.config.data_cache_dir):
            found = rows.build(self.config, tokenizer)
        self.held = [source for source in found.valid.values() if isinstance(source, rows.HeldOutRows)]
        return found

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        if self.config.eval_window == "rolling":
            # the sources take turns
            self.reported += 1
            self._roll()
        return means

    def _roll(self) -> None:
        for place, source in enumerate(self.held):
            source.window = (self.reported + len(self.held) - 1 - place) // len(self.held)

    def state_dict(self) -> dict[str, Any]:
        return {"reported": self.reported} if self.config.eval_window == "rolling" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reported = state.get("reported", 0)
        if self.config.eval_window == "rolling":
            self._roll()

    def network(self) -> PreTrainedModel:
        """The model to train: fresh by its sizes, or with the weights of another."""
        config, shape = self.config, self.config.shape
        divisible_by, restrict = config.make_vocab_size_divisible_by, config.restrict_logits
        ordered = config.order_target_position == "embedding"
        if shape is None:
            source = load_network(config.model)
            positions = int(source.config.max_position_embeddings)
            if config.max_length > positions:
                raise ConfigError(
                    f"max_length: {config.max_length} is beyond the {positions} positions of {config.model}; use at most {positions}"
                )
            model = warm(
                config.objective,
                source,
                std=config.init_std,
                divisible_by=divisible_by,
                restrict_logits=restrict,
                seed=config.seed,
                ordered=ordered,
            )
        else:
            model = fresh(
                config.objective, shape, self.vocabulary, tied=not config.untie_embeddings,
                positions=config.max_position_embeddings or config.max_length, theta=config.rotary_theta, eps=config.norm_eps,
                std=config.init_std, divisible_by=divisible_by, restrict_logits=restrict, seed=config.seed, ordered=ordered,
            )  # fmt: skip
        if self.vocabulary > model.config.real_vocab_size:
            raise ConfigError(
                f"tokenizer: has {self.vocabulary} entries, but {config.model} {model.config.real_vocab_size}; use the model's own"
            )
        return model

    def build(self) -> nn.Module:
        model = self.network()
        if self.config.randmask_ratio and self.config.randmask_mode != "input":
            model.config._attn_implementation = flex.NAME
        module = Scorer(model, attention_dropout=self.config.attention_dropout, hidden_dropout=self.config.hidden_dropout)
        if self.config.gradient_checkpointing:
            checkpoint_activations(module)
        elif self.config.recompute == "selective":
            for layer in decoder_layers(module):
                attention: Any = layer.self_attn
                attention.forward = partial(checkpoint, attention.forward, use_reentrant=False)
        self.parameters = sum(parameter.numel() for parameter in module.parameters())
        self.mask_id = int(model.config.mask_token_id)
        return module

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self.config.optimizer != "adam-torch":
            return super().optimizer(groups)
        config = self.config
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, foreach=False)

    def engine(self, model: nn.Module, device: torch.device) -> Engine | None:
        if self.config.pipeline_model_parallel_size > 1:
            from mdm_scaling.pipeline import Pipeline

            return Pipeline(self, model, device)
        if self.config.tensor_model_parallel_size == 1:
            return None
        from mdm_scaling.tensor_parallel import TensorParallel

        return TensorParallel(self, model, device)

    # --- what a batch is scored on ---

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        ids, labels, attention = self.cut(batch)
        if self.config.objective == "ar":
            inputs = self.perturbed(batch, ids, labels, attention) if model.training else {"input_ids_BS": ids, **self.seen(ids, attention)}
            yield Loss(total=model(**{"targets_M": labels.flatten(), **inputs}))
            return
        eligible = labels != IGNORE
        for masked, weight, share in self.masks(batch, eligible):
            counts = torch.stack([masked.sum(), eligible.sum()]).double()
            if self.config.ar_ratio and "t" not in batch:
                yield self.compared(model, batch, masked, eligible, weight, counts)
                continue
            total = losses.masked_total(model, ids, masked, weight * share, self.mask_id, **self.seen(ids, attention))
            yield Loss(total=total, metrics=self.measures(batch, total, counts))

    def perturbed(self, batch: Batch, ids: Tensor, labels: Tensor, attention: Tensor | None) -> dict[str, Any]:
        """What the network gets of an AR batch in training, with the experiments that are on."""
        config, size = self.config, ids.shape[1]
        inputs: dict[str, Any] = {"input_ids_BS": ids, **self.seen(ids, attention)}
        if config.num_orders > 1:
            table = experiments.orders(config.num_orders, size, config.use_predefined_order, config.seed)
            given, targets, positions, of_targets = experiments.reordered(ids, labels, table, config.seed, batch.index)
            told = {"target_positions": of_targets} if config.order_target_position == "embedding" else {}
            # positions out of order are no packed documents
            mask = experiments.causal(len(ids), size, ids.device)
            return {"input_ids_BS": given, "targets_M": targets.flatten(), "position_ids": positions, "attention_mask": mask, **told}
        if config.randmask_ratio and config.randmask_mode == "input":
            inputs["input_ids_BS"] = experiments.replaced(ids, config.randmask_ratio, self.mask_id, config.seed, batch.index)
        elif config.randmask_ratio and config.randmask_mode != "input":
            made = flex.token_mask if self.fused(ids) else experiments.seen
            inputs["attention_mask"] = made(config.randmask_mode, size, config.randmask_ratio, config.mask_eps, config.seed, batch.index)
        return inputs

    def fused(self, ids: Tensor) -> bool:
        """Whether attention asks a function who sees whom, and no tensor; on a CPU that has no backward."""
        return ids.is_cuda

    def seen(self, ids: Tensor, attention: Tensor | None) -> dict[str, Any]:
        """Who sees whom, and where: documents by themselves where they are kept apart."""
        config = self.config
        if not (config.reset_attention_mask or config.reset_position_ids):
            return {"attention_mask": attention}
        return experiments.documents(ids, self.end, config.objective == "ar", config.reset_attention_mask, config.reset_position_ids)

    def compared(self, model: nn.Module, batch: Batch, masked: Tensor, eligible: Tensor, weight: Tensor, counts: Tensor) -> Loss:
        """The loss with some masks turned into suffixes, and separately those of both kinds of sequences."""
        ids, _, attention = self.cut(batch)
        masked, chosen = experiments.suffixes(masked, eligible, self.config.ar_ratio, self.config.seed, batch.index)
        each = losses.masked_each(model, ids, masked, weight, self.mask_id, **self.seen(ids, attention))
        metrics = {"mask_ratio": counts}
        for name, group in (("suffix_mask_loss", chosen), ("random_mask_loss", ~chosen)):
            metrics[name] = torch.stack([each.detach()[group].sum().double(), eligible[group].sum().double()])
        return Loss(total=each.sum(), metrics=metrics)

    def measures(self, batch: Batch, total: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """The share of masked tokens; of an evaluation the name of its estimate, since an MDM's loss is a bound."""
        if "t" not in batch:
            return {"mask_ratio": counts}
        return {f"mdm_bound[stratified,mc={batch['t'].shape[1]}]": total}

    def targets(self, batch: Batch) -> int:
        _, labels, _ = self.cut(batch)
        if self.config.objective == "mdm" and self.config.loss_weight == "uniform" and "t" not in batch:
            return int(sum(int(masked.sum()) for masked, _, _ in self.masks(batch, labels != IGNORE)))
        return int((labels != IGNORE).sum())

    def tokens(self, batch: Batch) -> int:
        ids, _, attention = self.cut(batch)
        real = batch.index >= 0
        return int(real.sum()) * ids.shape[1] if attention is None else int(attention[real].sum())

    def cut(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """(input ids, labels, attention mask) with the sequences that `--variable-length-ratio` shortens cut there."""
        ids, labels = batch["input_ids"], batch["labels"]
        if self.config.variable_length_ratio == 0 or "t" in batch:
            return ids, labels, None
        end_B = lengths(self.config.variable_length_ratio, self.config.seed, "noise", batch.index, ids.shape[1])
        seen_BS = torch.arange(ids.shape[1], device=ids.device) < end_B[:, None]
        return ids, labels.masked_fill(~seen_BS, IGNORE), seen_BS.long()

    def masks(self, batch: Batch, eligible_BS: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
        """(masked, weight, share in the loss) of each draw: one in training, those of the rows in an evaluation."""
        config = self.config
        noise = Noise(config.mask_mode, config.mask_eps, config.loss_weight, config.max_loss_weight)
        if "t" in batch:
            count = batch["t"].shape[1]
            for draw in range(count):
                slot = batch.index * count + draw
                plain = Noise(eps=config.mask_eps)
                yield *masks(plain, batch["t"][:, draw], eligible_BS, config.eval_seed, "eval", slot), 1 / count
            return
        first, size = config.update(batch.step, dist.world())
        t_B = levels(config.t_sampling, config.seed, "noise", batch.step, (batch.index - first) % size, batch.index, size)
        if config.low_noise_start and batch.step < config.low_noise_iter:
            t_B = t_B * config.low_noise_ratio
        yield *masks(noise, t_B, eligible_BS, config.seed, "noise", batch.index), 1.0


def describe(config: PretrainConfig) -> str:
    """One line about the run, printed before it begins."""
    shape = config.shape
    what = config.model or "own sizes"
    size = f"N {shape.nominal:,}" if shape else "sizes of the model"
    length = "" if config.samples is None else f"  samples {config.samples:,}"
    where = " (a preset)" if config.model in sizes.ALL else ""
    return (
        f"{config.objective}  {what}{where}  {size}{length}  batch {config.global_batch_size} x {config.max_length}  "
        f"attention dropout {config.attention_dropout:g}  hidden dropout {config.hidden_dropout:g}"
    )
