"""Low-rank additions to the MLPs: trained instead of their weights, and added to them in everything that is exported."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lm_core.models import using_peft
from rwkv_distill.student import StudentModel

MARKS = (".base_layer.", ".lora_A.default.", ".lora_B.default.")


def add_adapters(student: StudentModel, rank: int) -> None:
    """Give every linear layer of the MLPs an adapter of peft. Their scale is 1, so that a file of tensors says all there is to know."""
    with using_peft() as peft:
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=r".*\.mlp\..*_proj")
        peft.inject_adapter_in_model(config, student)


def merged(student: StudentModel) -> StudentModel:
    """A student without adapters, their products added to the weights; the same one if it has none."""
    if not any(MARKS[0] in name for name, _ in student.named_parameters()):
        return student
    plain = copy.deepcopy(student)
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            adapted: Any = child
            if hasattr(child, "lora_A"):
                base = adapted.base_layer
                with torch.no_grad():
                    base.weight += adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
                setattr(module, name, base)
    return plain


def summed(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, those of adapters added to the weights that they belong to."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        mark = next((mark for mark in MARKS if mark in name), None)
        if mark is None:
            yield name, tensor
        else:
            parts.setdefault(name.replace(mark, "."), {})[mark] = tensor
    base, down, up = MARKS
    for name, part in parts.items():
        yield name, part[base] + part[up] @ part[down] if up in part else part[base]
