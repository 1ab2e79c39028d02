"""Stage 2: the student as a whole learns the teacher's next-token distribution.

B batch, T time, M positions, D and E hidden sizes of student and teacher, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels_cuda.head import linear_kl
from lm_core import dist
from lm_core.deepspeed_settings import split
from lm_core.engine.frozen import freeze
from lm_core.errors import ConfigError, InputError
from lm_core.method import IGNORE, Batch, Loss, Rule
from lm_core.models import checkpoint_activations, load_model, load_tokenizer
from rwkv_distill.adapters import add_adapters, merged
from rwkv_distill.align import hf_student, require_positions, unmasked
from rwkv_distill.config import MODELS, TrainConfig
from rwkv_distill.hf.modeling_rwkv_distill import positions
from rwkv_distill.method import StudentMethod, new_student
from rwkv_distill.rules import student_rules
from rwkv_distill.student import StudentModel, untie
from rwkv_distill.teacher_cache import TeacherCache
from rwkv_distill.weights import load_into

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WithWeight = Callable[[Tensor], Any]


class Head(nn.Linear):
    """An output head that lends its weight to a function.

    The function runs inside the head's own forward, because engines that gather a weight only while its module runs (ZeRO-3) would show
    an empty one anywhere else.
    """

    def forward(self, input: Tensor, then: WithWeight | None = None) -> Any:
        return super().forward(input) if then is None else then(self.weight)


class Teacher(nn.Module):
    """A model whose hidden states and head are lent to a function inside its forward, where engines that share weights out have them whole."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.get_output_embeddings().__class__ = Head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, then: Callable[[Tensor, Tensor], None]
    ) -> None:
        with torch.no_grad():
            hidden = teacher_hidden(self.model, input_ids, attention_mask, segment_ids).flatten(0, 1)
        self.model.get_output_embeddings()(hidden, lambda weight_VE: then(hidden, weight_VE))


class DistilledLogits(nn.Module):
    """A student and, outside of what is trained or saved, its teacher; None where a cache takes its place."""

    lender: Any

    def __init__(self, student: StudentModel, teacher: nn.Module | None, sharded_on: torch.device | None = None) -> None:
        super().__init__()
        self.student = student
        student.lm_head.__class__ = Head
        # not a submodule
        lender = None if teacher is None else freeze(Teacher(teacher), sharded=sharded_on is not None, device=sharded_on)
        object.__setattr__(self, "lender", lender)

    @property
    def teacher(self) -> Any:
        return self.lender.model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        segment_ids: Tensor | None,
        kl_mask: Tensor,
        targets: Tensor,
        cached: tuple[Tensor, Tensor, Tensor] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(weighted sum, mean divergence over `kl_mask`, mean cross entropy over `targets`); `options` are those of `linear_kl`.

        kl_mask (B x T, bool) and targets (B x T, shifted already, -100 for none) say where either counts. `cached`: the teacher's
        likeliest tokens as `linear_kl` takes them, instead of the teacher.
        """
        hidden = self.student.model(input_ids, attention_mask, segment_ids)[0].flatten(0, 1)
        mask, labels = kl_mask.flatten(), targets.flatten()

        def compare(weight_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if cached is not None:
                return linear_kl(hidden, weight_VD, cached, mask, labels, **options)
            found: list[tuple[Tensor, Tensor, Tensor]] = []
            self.move(input_ids.device)(
                input_ids, attention_mask, segment_ids,
                lambda theirs, weight_VE: found.append(linear_kl(hidden, weight_VD, (theirs, weight_VE), mask, labels, **options)),
            )  # fmt: skip
            return found[0]

        result: tuple[Tensor, Tensor, Tensor] = self.student.lm_head(hidden, compare)
        return result

    def move(self, device: torch.device) -> Any:
        """The teacher on this device."""
        if next(self.lender.parameters()).device != device:
            self.lender.to(device)
        return self.lender


def teacher_hidden(teacher: Any, input_ids: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """Hidden states (B x T x E) behind a teacher's final norm."""
    place: Tensor | None = positions(input_ids[:, :, None], attention_mask, segment_ids, None).expand_as(input_ids)
    if segment_ids is not None:
        # transformers separates documents where positions start again, and only without a mask; a padding token is a document
        place = place if attention_mask is None or place is None else place.masked_fill(attention_mask == 0, 0)
        attention_mask = None
    elif attention_mask is None:
        place = None
    found: Tensor = teacher.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=place, use_cache=False
    ).last_hidden_state
    return found


def whole_student(config: TrainConfig) -> StudentModel:
    """The student of stages 2 and 3, with the parts of a teacher of its own, since it will change them."""
    student = new_student(config, load_model(config.model, presets=MODELS, seed=config.seed))
    # only stage 1 looks at these
    del student.teacher_attentions
    if config.ckpt_file is not None and torch.get_default_device().type != "meta":
        load_into(student, config.ckpt_file, fresh_mixers=config.chose_init())
    if config.full_params:
        untie(student)
    for layer in student.model.layers:
        layer.dropout = config.dropout
    if config.mlp_lora_rank:
        add_adapters(student, config.mlp_lora_rank)
    return student


class Distill(StudentMethod):
    """Stage 2: divergence from the teacher, and cross entropy of the text, each with its weight."""

    config: TrainConfig
    # ids that student and teacher both have
    columns: int | None = None
    resumable = StudentMethod.resumable | {"kl_chunk"}
    cache: TeacherCache | None = None

    def build(self) -> nn.Module:
        config = self.config
        if config.teacher_cache is not None:
            self.cache = TeacherCache(config.teacher_cache, self.tokenizer())
            student = whole_student(config)
            self.columns = min(self.cache.columns, student.config.vocab_size)
            return self._recomputed(DistilledLogits(student, None))
        teacher: Any = load_model(config.teacher_model_id or config.model, presets=MODELS, seed=config.seed)
        require_positions(teacher.config, config.max_length)
        student = whole_student(config)
        self.columns = min(teacher.config.vocab_size, student.config.vocab_size)
        require_shared_tokens(config, self.tokenizer(), self.columns)
        if config.precision == "bf16":
            teacher = teacher.to(torch.bfloat16)
        # where the student's weights are shared out over processes, so are the teacher's
        shares = dist.world() > 1 and split(config)[0] == 3 and torch.get_default_device().type != "meta"
        return self._recomputed(DistilledLogits(student, teacher, dist.init(config.device) if shares else None))

    def _recomputed(self, module: nn.Module) -> nn.Module:
        if self.config.gradient_checkpointing:
            checkpoint_activations(module)
        return module

    def final_model(self, model: nn.Module) -> PreTrainedModel:
        return merged(hf_student(model))

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        config = self.config
        if self.columns is not None and batch["input_ids"].device.type == "cpu" and int(batch["input_ids"].max()) >= self.columns:
            raise InputError(f"data: holds the id {int(batch['input_ids'].max())}, but student and teacher share only {self.columns} ids")
        mask, labels = self.compared(batch), next_tokens(batch)
        compared, labelled = int(mask.sum()), int((labels != IGNORE).sum())
        total, kl, ce = model(
            batch["input_ids"],
            batch.get("attention_mask"),
            batch.get("document_ids"),
            mask,
            labels,
            None if self.cache is None else self.cache.of(batch),
            tau=config.temperature,
            direction=config.kl_direction,
            # means times their counts are sums
            kl_w=config.kl_weight * compared,
            ce_w=config.ce_weight * labelled,
            chunk=config.kl_chunk,
            vocabulary=None if self.cache is None else self.columns,
        )
        counts = {"kl": (kl, compared), "ce": (ce, labelled)}
        yield Loss(
            total=total, metrics={name: torch.stack([mean * count, mean.new_tensor(count)]) for name, (mean, count) in counts.items()}
        )

    def targets(self, batch: Batch) -> int:
        """Positions whose distribution is compared; those with a label, where only cross entropy counts."""
        if self.config.kl_weight > 0:
            return self.tokens(batch) if self.config.kl_on == "all" else int(self.compared(batch).sum())
        return int((next_tokens(batch) != IGNORE).sum())

    def compared(self, batch: Batch) -> Tensor:
        """Positions (B x T, bool) whose distributions are compared."""
        real = unmasked(batch)
        return real if self.config.kl_on == "all" else real & (next_tokens(batch) != IGNORE)

    def param_rules(self) -> list[Rule]:
        return student_rules(full=self.config.full_params, mlp=not self.config.freeze_mlp)

    def flops_per_token(self, model: nn.Module) -> float:
        """Forward of teacher and student, backward through the student; products of weights alone, without attention scores."""
        student, lender = hf_student(model), cast(DistilledLogits, model).lender
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad and p.ndim >= 2)
        forward = sum(sum(p.numel() for p in part.parameters() if p.ndim >= 2) for part in (student, lender) if part is not None)
        head = student.lm_head.weight.numel()
        # gradients pass through frozen matrices, too, and those of trained ones are a product more
        return float(2 * forward + 2 * (sum(p.numel() for p in student.model.layers.parameters()) + head) + 2 * trained)


def next_tokens(batch: Batch) -> Tensor:
    """Labels (B x T) aligned with the positions that predict them; the last one of a row or document predicts nothing."""
    return F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)


def require_shared_tokens(config: TrainConfig, tokenizer: Any, columns: int) -> None:
    """Raise ConfigError where another teacher (`teacher_model_id`) has other tokens below `columns`."""
    # made-up models have no tokenizer of their own
    if config.teacher_model_id is not None and config.teacher_model_id not in MODELS:
        require_same_tokens(tokenizer, load_tokenizer(config.teacher_model_id), columns)


def require_same_tokens(ours: Any, theirs: Any, columns: int) -> None:
    """Raise ConfigError naming the first id below `columns` that two tokenizers give to different tokens."""
    tables = [{number: token for token, number in tokenizer.get_vocab().items() if number < columns} for tokenizer in (ours, theirs)]
    for number in sorted(tables[0].keys() | tables[1].keys()):
        mine, other = (table.get(number) for table in tables)
        if mine != other:
            raise ConfigError(
                f"teacher_model_id: id {number} is {mine!r} for the student and {other!r} for this teacher; use a teacher with the same tokens"
            )
