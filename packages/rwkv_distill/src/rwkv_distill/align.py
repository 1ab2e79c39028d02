"""Stage 1: every mixer learns to give what the teacher's attention gives at its place.

The stream is the teacher's throughout, so layers learn independently; only the value of the first RWKV layer links them.
B batch, T time, D hidden size, A query heads x head width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lm_core import dist
from lm_core.deepspeed_settings import split
from lm_core.engine.frozen import freeze
from lm_core.errors import ConfigError
from lm_core.method import Batch, Loss, Rule
from lm_core.models import load_model
from lm_core.run import make_loader
from rwkv_distill.config import MODELS, TrainConfig
from rwkv_distill.hf.modeling_rwkv_distill import Beside
from rwkv_distill.losses import Align as Kind
from rwkv_distill.losses import misfit
from rwkv_distill.method import StudentMethod, new_student
from rwkv_distill.rules import mixer_rules
from rwkv_distill.student import StudentModel
from rwkv_distill.weights import load_into

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lm_core.data import Data
    from rwkv_distill.hf.modeling_rwkv_distill import Context, RwkvDistillLayer

log = logging.getLogger(__name__)

CALIBRATION_SAMPLES = 8


class AlignedLayers(nn.Module):
    """A student, and outside of what is trained or saved the teacher's attention."""

    attentions: nn.ModuleList

    def __init__(self, student: StudentModel, attentions: list[nn.Module], recompute: bool = False) -> None:
        super().__init__()
        self.student = student
        self.recompute = recompute
        # those of softmax layers belong to the student
        own = {id(module) for module in student.modules()}
        freeze(nn.ModuleList(attention for attention in attentions if id(attention) not in own), sharded=False)
        # not a submodule
        object.__setattr__(self, "attentions", nn.ModuleList(attentions))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        real: Tensor | None = None,
        kind: Kind = "l2",
        local: bool = False,
    ) -> Iterable[tuple[int, Tensor]]:
        """Layer and summed misfit (see `losses.misfit`) of every RWKV layer, over the positions `real` (B x T, default: all unmasked).

        With `local` each loss has a graph of its own, to be back-propagated before the next one is asked for: the first RWKV layer
        comes last, and takes in the gradient that later layers have for its value.
        """
        if real is None:
            real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        v_first: Tensor | None = None

        def use(layer: RwkvDistillLayer, u: Tensor, target: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
            y, value = self._mix(layer, u, v_first, context)
            return misfit(target, y, real, kind), value

        def one_by_one() -> Iterator[tuple[int, Tensor]]:
            nonlocal v_first
            held: tuple[int, Tensor, Tensor, Tensor] | None = None
            for layer, (loss, value) in self._layers(use, input_ids, attention_mask, segment_ids):
                if local and v_first is None and value is not None:
                    v_first = value.detach().requires_grad_()
                    held = layer.index, loss, value, v_first
                    continue
                v_first = value
                yield layer.index, loss
            if held is not None:
                index, loss, value, leaf = held
                yield index, loss + _Collected.apply(value, leaf)  # type: ignore[no-untyped-call]

        # within this forward, unless graphs are to die one by one
        return one_by_one() if local else list(one_by_one())

    def targets(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> Iterator[tuple[RwkvDistillLayer, Tensor, Tensor, Context]]:
        """For every RWKV layer its normalised input u and the teacher's attention of it, both B x T x D, without gradients."""
        for layer, given in self._layers(lambda _, *given: given, input_ids, attention_mask, segment_ids):
            yield layer, *given

    def _layers(self, use: Callable[..., Any], input_ids: Tensor, *masks: Tensor | None) -> Iterator[tuple[RwkvDistillLayer, Any]]:
        """Every RWKV layer with what `use` gives for it, along the teacher's stream."""
        if next(self.attentions.parameters()).device != input_ids.device:
            self.attentions.to(input_ids.device)
        layers: list[Any] = list(self.student.model.layers)
        with torch.no_grad():
            x, context = self.student.model.begin(input_ids, *masks, every_mask=True)
        behind = max(layer.index for layer in layers if layer.recurrent)
        for layer, attention in zip(layers[: behind + 1], self.attentions):
            x, given = layer(x, None, context, Beside(attention, use, last=layer.index == behind))
            if layer.recurrent:
                yield layer, given

    def _mix(self, layer: RwkvDistillLayer, u: Tensor, v_first: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer.mix, u, v_first, context, use_reentrant=False)  # type: ignore[no-any-return]
        return layer.mix(u, v_first, context)


class _Collected(torch.autograd.Function):
    """Zero, with the gradient that has gathered at `leaf` (already scaled as the engine scales) as that of `value`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return value.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        leaf: Tensor = ctx.leaf
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, None


@torch.no_grad()
def calibration(layers: AlignedLayers, batches: list[Batch]) -> dict[int, float]:
    """Factor of each mixer's output that brings it nearest to the teacher's attention: <t, y> / <y, y>, within 1e-3 and 1e3.

    Sums run over the unmasked positions of `batches` and over all processes.
    """
    device = next(layers.parameters()).device
    sums: dict[int, Tensor] = {}
    for batch in (batch.to(device) for batch in batches):
        v_first: Tensor | None = None
        real = unmasked(batch)[:, :, None]
        for layer, u, target, context in layers.targets(batch["input_ids"], batch.get("attention_mask"), batch.get("document_ids")):
            y, v_first = layer.mix(u, v_first, context)
            t, y = (value.double().masked_fill(~real, 0.0) for value in (target, y))
            sums[layer.index] = sums.get(layer.index, 0) + torch.stack([(t * y).sum(), (y * y).sum()])
    totals = {index: dist.all_sum(total).tolist() for index, total in sums.items()}
    return {index: min(1e3, max(1e-3, ty / yy)) if yy > 0 else 1.0 for index, (ty, yy) in totals.items()}


@torch.no_grad()
def scale_outputs(student: StudentModel, factors: dict[int, float]) -> None:
    """Multiply the output projections of the mixers."""
    for index, mixer in student.mixers().items():
        for parameter in mixer.output.parameters():
            parameter.mul_(factors[index])


def unmasked(batch: Batch) -> Tensor:
    """Positions (B x T, bool) that are neither padding nor part of a row that only fills up a batch."""
    mask = batch.get("attention_mask")
    real = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return real & (batch.index >= 0)[:, None]


class Align(StudentMethod):
    """Stage 1. Only mixers are trained; the head is never evaluated."""

    config: TrainConfig
    resumable = StudentMethod.resumable | {"layer_local"}

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self._data: Data | None = None

    def data(self, tokenizer: PreTrainedTokenizerBase) -> Data:
        self._data = super().data(tokenizer)
        return self._data

    def build(self) -> nn.Module:
        config = self.config
        local = self.layer_local()
        if config.layer_local and not local:
            log.info("layer_local: weights or gradients are shared out over processes, so that all layers are back-propagated at once")
        teacher: Any = load_model(config.model, presets=MODELS, seed=config.seed)
        require_positions(teacher.config, config.max_length)
        student = new_student(config, teacher)
        attentions = student.teacher_attentions
        if not student.mixers():
            raise ConfigError("layers: no layer is replaced, so there is nothing to train; name at least one layer")
        layers = AlignedLayers(student, attentions, recompute=config.gradient_checkpointing and not local)
        if config.precision == "bf16" and split(config)[0] > 0:
            # such engines turn the student into bfloat16, where others use autocast
            layers.attentions.to(torch.bfloat16)
        if config.ckpt_file is not None and torch.get_default_device().type != "meta":
            load_into(student, config.ckpt_file, fresh_mixers=config.chose_init())
        elif config.calibrate and torch.get_default_device().type != "meta":
            self.calibrate(layers)
        return layers

    def layer_local(self) -> bool:
        """Whether every layer is back-propagated alone, which needs all of its weights and gradients on every process."""
        return self.config.layer_local and split(self.config)[0] < 2

    def calibrate(self, layers: AlignedLayers) -> None:
        """Scale the output projections by the first samples of the run."""
        data = self._data or self.data(self.tokenizer())
        loader = make_loader(self.config, data, dist.rank(), dist.world())
        # a number of samples, so that the factors depend neither on micro-batches nor on processes
        steps = -(-CALIBRATION_SAMPLES // loader.global_batch)
        factors = calibration(layers, [batch for _ in range(steps) for batch in next(loader)])
        scale_outputs(layers.student, factors)
        log.info("calibrated the output of %d mixers by %.3g to %.3g", len(factors), min(factors.values()), max(factors.values()))

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        real, local = unmasked(batch), self.layer_local()
        terms = model(
            batch["input_ids"], batch.get("attention_mask"), batch.get("document_ids"), real, kind=self.config.align_loss, local=local
        )
        count = len(hf_student(model).mixers())
        if local:
            for index, loss in terms:
                yield Loss(total=loss / count, metrics={f"align/{index}": loss.detach()})
            return
        found = dict(terms)
        yield Loss(
            total=torch.stack(list(found.values())).sum() / count,
            metrics={f"align/{index}": loss.detach() for index, loss in found.items()},
        )

    def targets(self, batch: Batch) -> int:
        """Every unmasked position has the teacher's attention to match."""
        return self.tokens(batch)

    def param_rules(self) -> list[Rule]:
        return [*mixer_rules(), Rule("", trained=False)]

    def flops_per_token(self, model: nn.Module) -> float:
        """Forward through norms, MLPs and both kinds of attention, backward through the mixers; the head is not evaluated."""
        student = hf_student(model)
        mixing = sum(p.numel() for mixer in student.mixers().values() for p in mixer.parameters())
        kept = sum(p.numel() for layer in student.model.layers for p in layer.parameters()) - mixing
        attentions: Any = model.attentions
        attention = sum(p.numel() for p in attentions.parameters())
        return float(2 * (kept + attention) + 6 * mixing)


def hf_student(model: nn.Module) -> StudentModel:
    """The student inside a method's module, wrapped by an engine or not."""
    return next(part for part in model.modules() if isinstance(part, StudentModel))


def require_positions(teacher: Any, max_length: int) -> None:
    """Raise ConfigError for rows longer than the teacher reads."""
    limit = getattr(teacher, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise ConfigError(f"max_length: {max_length} is beyond the {limit} positions of the teacher; use at most {limit}")
