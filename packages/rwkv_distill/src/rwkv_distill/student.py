"""A student made from a teacher, and read back from a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from lm_core.errors import ConfigError, InputError
from lm_core.models import load_model
from rwkv_distill import hf, init
from rwkv_distill.hf.configuration_rwkv_distill import RwkvDistillConfig
from rwkv_distill.hf.modeling_rwkv_distill import RwkvDistillForCausalLM
from rwkv_distill.losses import Align
from rwkv_distill.student_config import TEACHERS, StudentConfig, resolve

# which file of a saved folder holds which class
AUTO_MAP = {
    "AutoConfig": "configuration_rwkv_distill.RwkvDistillConfig",
    "AutoModelForCausalLM": "modeling_rwkv_distill.RwkvDistillForCausalLM",
}
AutoConfig.register(RwkvDistillConfig.model_type, RwkvDistillConfig)


class StudentModel(RwkvDistillForCausalLM):  # type: ignore[no-untyped-call]
    """The student as it is trained. Saved folders hold the modelling code, so they load where this package is not installed."""

    teacher_attentions: list[nn.Module]

    @classmethod
    def from_teacher(cls, teacher: str | PreTrainedModel, config: StudentConfig | None = None) -> Self:
        """The untrained student of a teacher (a model argument, or a model, whose embeddings, norms, MLPs and head it takes over).

        Raises ConfigError where the two do not fit.
        """
        config = config or StudentConfig()
        model = load_model(teacher) if isinstance(teacher, str) else teacher
        if model.config.model_type not in TEACHERS:
            raise ConfigError(f"model: a teacher of type {model.config.model_type} is not supported; use one of {', '.join(TEACHERS)}")
        backbone: Any = model.base_model
        attentions = [layer.self_attn for layer in backbone.layers]
        first = attentions[0]
        fields = resolve(
            config, model.config, bias=first.q_proj.bias is not None, output_bias=first.o_proj.bias is not None,
            qk_norm=hasattr(first, "q_norm"),
        )  # fmt: skip
        values = {"model_type": model.config.model_type, **model.config.to_dict()}
        for mark in ("architectures", "_name_or_path", "transformers_version", "dtype", "quantization_config"):
            values.pop(mark, None)
        with no_init_weights():
            student = cls(RwkvDistillConfig(teacher=values, student=fields), backbone)
        student.lm_head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        # for stage 1, and no part of the student
        object.__setattr__(student, "teacher_attentions", attentions)
        shift = config.token_shift_init or ("zero" if config.init == "copy" else "rwkv")
        for layer, attention in zip(student.model.layers, attentions):
            if layer.recurrent:
                init.initialise(layer.self_attn.time_mixer, attention, len(attentions), init=config.init, token_shift=shift)
        student.config.auto_map = dict(AUTO_MAP)
        student.generation_config = model.generation_config
        student.train()
        return student

    def mixers(self) -> dict[int, Any]:
        """The time mixers by layer."""
        return {layer.index: layer.self_attn.time_mixer for layer in self.model.layers if layer.recurrent}

    def alignment_losses(self, input_ids: Tensor, attention_mask: Tensor | None = None, kind: Align = "l2") -> Tensor:
        """Mean distance of every mixer's output from the teacher's attention, by layer, with gradients. Needs `from_teacher`."""
        from rwkv_distill.align import AlignedLayers

        count = input_ids.numel() if attention_mask is None else attention_mask.sum()
        layers = AlignedLayers(self, self.teacher_attentions)
        return torch.stack([loss for _, loss in layers(input_ids, attention_mask, kind=kind)]) / count

    def save_pretrained(self, save_directory: Any, pytorch_bin: bool = True, **options: Any) -> None:  # type: ignore[override]
        """Weights and configuration, and beside them the modelling code, named as what loads without this package."""
        # a copy, since the tensors are taken out of the mapping while they are written
        state = dict(options.get("state_dict") or self.state_dict())
        super().save_pretrained(save_directory, **options)
        if pytorch_bin:
            # the guide's --ckpt-file names this file
            torch.save({name: tensor.detach() for name, tensor in state.items()}, Path(save_directory) / "pytorch_model.bin")
        self.config.architectures = [RwkvDistillForCausalLM.__name__]
        self.config.save_pretrained(save_directory)
        for file in sorted(Path(hf.__file__).parent.glob("*_rwkv_distill.py")):
            shutil.copy(file, save_directory)


@torch.no_grad()
def untie(student: StudentModel) -> None:
    """Give the head weights of its own, if it shares those of the embedding."""
    if not student.config.tie_word_embeddings:
        return
    student.lm_head.weight = nn.Parameter(student.lm_head.weight.detach().clone())
    student.config.tie_word_embeddings = False
    student.config.teacher["tie_word_embeddings"] = False


AutoModelForCausalLM.register(RwkvDistillConfig, StudentModel)


def load_student(path: str | Path, dtype: torch.dtype = torch.float32) -> StudentModel:
    """The student in a folder: `final/`, an exported one, or a checkpoint. Raises InputError when there is none."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"model: {path} holds no student (no config.json); name a final/ folder or a checkpoint of rwkv-distill train")
    if json.loads((folder / "config.json").read_text()).get("model_type") != RwkvDistillConfig.model_type:
        raise InputError(f"model: {path} is no student of rwkv-distill; name a final/ folder or a checkpoint of rwkv-distill train")
    if _has_adapters(folder):
        from rwkv_distill.weights import load_into

        student = StudentModel(RwkvDistillConfig.from_pretrained(folder))
        load_into(student, folder)
        nn.Module.to(student, dtype)
        return student
    model = load_model(str(folder), dtype=dtype)
    assert isinstance(model, StudentModel)
    return model


def _has_adapters(folder: Path) -> bool:
    """Whether this is a checkpoint of a run that trains additions to the MLPs."""
    file = folder / "model.safetensors"
    if not (folder / "state.json").is_file() or not file.is_file():
        return False
    with safe_open(file, framework="pt") as opened:
        return any(".lora_A." in name for name in opened.keys())  # noqa: SIM118 - the handle is not iterable
