"""Stage 3: the student learns the text itself, without a teacher: longer contexts, or other data.

B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from kernels_cuda.head import linear_cross_entropy
from lm_core.method import IGNORE, Batch, Loss, Rule
from lm_core.models import checkpoint_activations
from rwkv_distill.adapters import merged
from rwkv_distill.align import hf_student, require_positions
from rwkv_distill.config import TrainConfig
from rwkv_distill.distill import Head, next_tokens, whole_student
from rwkv_distill.method import StudentMethod
from rwkv_distill.rules import student_rules
from rwkv_distill.student import StudentModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LabelledText(nn.Module):
    """A student and the cross entropy of its head, without the full logits."""

    def __init__(self, student: StudentModel) -> None:
        super().__init__()
        self.student = student
        student.lm_head.__class__ = Head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None, targets: Tensor) -> Tensor:
        """Summed cross entropy of `targets` (B x T, shifted already, -100 for none)."""
        hidden = self.student.model(input_ids, attention_mask, segment_ids)[0].flatten(0, 1)
        total: Tensor = self.student.lm_head(hidden, lambda weight_VD: linear_cross_entropy(hidden, weight_VD, targets.flatten()))
        return total


class Finetune(StudentMethod):
    """Stage 3: next-token cross entropy."""

    config: TrainConfig

    def build(self) -> nn.Module:
        student = whole_student(self.config)
        require_positions(student.config, self.config.max_length)
        module = LabelledText(student)
        if self.config.gradient_checkpointing:
            checkpoint_activations(module)
        return module

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        yield Loss(total=model(batch["input_ids"], batch.get("attention_mask"), batch.get("document_ids"), next_tokens(batch)))

    def targets(self, batch: Batch) -> int:
        """Positions that predict a labelled token."""
        return int((next_tokens(batch) != IGNORE).sum())

    def final_model(self, model: nn.Module) -> PreTrainedModel:
        return merged(hf_student(model))

    def param_rules(self) -> list[Rule]:
        return student_rules(full=self.config.full_params, mlp=not self.config.freeze_mlp)

    def flops_per_token(self, model: nn.Module) -> float:
        """Products of weights alone: forward, backward through the layers and the head, and those of trained weights once more."""
        student = hf_student(model)
        passed = sum(p.numel() for p in student.model.layers.parameters() if p.ndim >= 2) + student.lm_head.weight.numel()
        return float(4 * passed + 2 * sum(p.numel() for p in student.parameters() if p.requires_grad and p.ndim >= 2))
