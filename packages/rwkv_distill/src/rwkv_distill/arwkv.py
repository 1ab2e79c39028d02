"""The layout of ARWKV checkpoints (`RwkvHybridForCausalLM`), which llama.cpp converts, and that of RWKV-LM for mixers alone.

D hidden size, A query heads x head width (here equal), H heads of 64.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lm_core.engine.state import write_json, write_tensors
from lm_core.errors import ConfigError, InputError
from rwkv_distill.hf.configuration_rwkv_distill import RwkvDistillConfig
from rwkv_distill.init import repeated
from rwkv_distill.mixers import Rwkv7Mixer
from rwkv_distill.student import AUTO_MAP, StudentModel

ARCHITECTURE = "RwkvHybridForCausalLM"
RANKS = {"decay": 64, "iclr": 64, "value": 32, "gate": 128}
SHIFTS = ("x_r", "x_w", "x_k", "x_v", "x_a")
_COPIED = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "rms_norm_eps", "max_position_embeddings", "hidden_act",
)  # fmt: skip


def violations(config: RwkvDistillConfig) -> list[str]:
    """Why a student has no place in this layout; empty if it has one."""
    student, teacher = config.student, config.teacher
    width = config.num_attention_heads * config.head_dim
    gate = RANKS["gate"] - (student["gate"] == "residual")
    ranks = {**RANKS, "gate": gate} if student["gate"] != "none" else {name: RANKS[name] for name in ("decay", "iclr", "value")}
    found = {
        f"version is {student['version']}, not v7": student["version"] != "v7",
        "some layers keep softmax attention": len(student["layers"]) < config.num_hidden_layers,
        f"head_size is {student['head_size']}, not 64": student["head_size"] != 64,
        f"the heads are {width} wide together, not as wide as the hidden size {config.hidden_size}": width != config.hidden_size,
        "qkv_bias is on": student["qkv_bias"] or student["output_bias"],
        "rope is on": student["rope"],
        "qk_norm is on": student["qk_norm"],
        "wkv_scale is on": student["wkv_scale"] and not student["group_norm"],
        "value_residual is off": not student["value_residual"],
        f"lora ranks are {student['ranks']}, not {ranks}": any(student["ranks"][name] != rank for name, rank in ranks.items()),
        "the MLPs have biases": bool(teacher.get("mlp_bias")),
        f"the activation is {teacher.get('hidden_act')}, not silu": teacher.get("hidden_act") != "silu",
    }
    return [text for text, wrong in found.items() if wrong]


def to_arwkv(model: StudentModel, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write `model` as config.json and model.safetensors. Raises ConfigError that lists every reason why it cannot be."""
    if found := violations(model.config):
        raise ConfigError(f"format: arwkv has no place for this student: {'; '.join(found)}; use --format hf")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in model.state_dict().items() if "time_mixer" not in name}
    tensors = {**kept, "lm_head.weight": model.lm_head.weight.detach()}
    for index, mixer in model.mixers().items():
        prefix = f"model.layers.{index}.self_attn.time_mixer."
        tensors |= {prefix + name: value for name, value in time_mixer(mixer).items()}
    write_tensors(folder / "model.safetensors", {name: tensor.to(dtype) for name, tensor in tensors.items()})
    write_json(folder / "config.json", _config(model.config, dtype))
    return folder


def time_mixer(mixer: Any) -> dict[str, Tensor]:
    """The tensors of one mixer as this layout has them: every part there, keys and values of all heads, the gate a plain one."""
    own = {name: value.detach() for name, value in mixer.state_dict().items()}
    hidden, width = mixer.receptance.in_features, mixer.receptance.out_features
    zero = own["w0"].new_zeros
    shifts = (*SHIFTS, "x_g") if mixer.gate != "none" else SHIFTS
    full = {name: zero(1, 1, hidden) for name in shifts}
    # the first layer has these, too, and nobody reads them there
    full |= {"v0": zero(1, 1, width), "v1": zero(hidden, RANKS["value"]), "v2": zero(RANKS["value"], width)}
    full |= {"r_k": zero(mixer.heads, mixer.size)}
    full |= own
    for name in ("key", "value"):
        full[f"{name}.weight"] = repeated(own[f"{name}.weight"], width, mixer.head_width)
    if mixer.gate == "residual":
        # sigmoid(0) * 2 is the one that is added
        full["g1"] = torch.cat([own["g1"], zero(hidden, 1)], 1)
        full["g2"] = torch.cat([own["g2"], torch.full_like(own["g2"][:1], 2.0)])
    return full


def _config(config: RwkvDistillConfig, dtype: torch.dtype) -> dict[str, Any]:
    student, teacher = config.student, config.teacher
    rope = teacher.get("rope_parameters") or {}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "rwkv_hybrid",
        **{name: teacher[name] for name in _COPIED},
        "head_size": 64,
        "head_size_divisor": 8,
        "num_attention_heads": config.hidden_size // 64,
        "num_key_value_heads": config.hidden_size // 64,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "wkv_version": 7,
        "wkv_has_gate": student["gate"] != "none",
        "wkv_has_group_norm": student["group_norm"],
    }


def to_pth(model: StudentModel, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the mixers alone, named as RWKV-LM names them, into `mixers.pth`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"blocks.{index}.att.{name}": value.to(dtype).clone()
        for index, mixer in model.mixers().items()
        for name, value in (time_mixer(mixer) if isinstance(mixer, Rwkv7Mixer) else version_6(mixer)).items()
    }
    torch.save(tensors, folder / "mixers.pth")
    return folder


def version_6(mixer: Any) -> dict[str, Tensor]:
    """The tensors of an RWKV-6 mixer under RWKV-LM's names."""
    other = {"m1": "time_maa_w1", "m2": "time_maa_w2", "w0": "time_decay", "w1": "time_decay_w1", "w2": "time_decay_w2", "u": "time_faaaa"}
    other |= {f"x_{name}": f"time_maa_{name}" for name in ("x", *mixer.inputs)}
    return {other.get(name, name): value.detach() for name, value in mixer.state_dict().items()}


def from_arwkv(folder: str | Path) -> StudentModel:
    """The student that `to_arwkv` wrote, in float32; the constant column of a residual gate is recognised and taken away.

    Raises InputError for folders of another architecture.
    """
    folder = Path(folder)
    try:
        values = json.loads((folder / "config.json").read_text())
        saved = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise InputError(f"path: {folder} holds no config.json and model.safetensors that can be read ({error})") from error
    if values.get("architectures") != [ARCHITECTURE]:
        raise InputError(f"path: {folder} is {values.get('architectures')}, not {ARCHITECTURE}; name a folder in the ARWKV layout")
    prefix = "model.layers.{}.self_attn.time_mixer."
    first = {name.removeprefix(prefix.format(0)): tensor for name, tensor in saved.items() if name.startswith(prefix.format(0))}
    gate = "none"
    if values["wkv_has_gate"]:
        constant = not first["g1"][:, -1].any() and bool((first["g2"][-1] == 2).all())
        gate = "residual" if constant else "sigmoid"
    student = {
        "head_size": 64, "kv_heads": "expanded", "qkv_bias": False, "output_bias": False, "qk_norm": False, "rope": False,
        "token_shift": True, "group_norm": values["wkv_has_group_norm"], "gate": gate, "wkv_scale": False, "value_residual": True,
        "bonus": True, "version": "v7", "layers": list(range(values["num_hidden_layers"])),
        "ranks": {**RANKS, "gate": RANKS["gate"] - (gate == "residual")},
    }  # fmt: skip
    teacher = {"model_type": "llama", **{name: values[name] for name in _COPIED}, "head_dim": 64, "tie_word_embeddings": False}
    teacher |= {name: values[name] for name in ("num_attention_heads", "num_key_value_heads", "bos_token_id", "eos_token_id")}
    teacher["rope_parameters"] = {"rope_type": "default", "rope_theta": values["rope_theta"]}
    model = StudentModel(RwkvDistillConfig(teacher=teacher, student=student))
    model.config.auto_map = dict(AUTO_MAP)
    for index in range(values["num_hidden_layers"]):
        at = prefix.format(index)
        if gate == "residual":
            saved[at + "g1"], saved[at + "g2"] = saved[at + "g1"][:, :-1], saved[at + "g2"][:-1]
        if index == 0:
            for name in ("v0", "v1", "v2"):
                del saved[at + name]
    model.load_state_dict({name: tensor.float() for name, tensor in saved.items()})
    return model


def copy_tokenizer(source: Path, target: Path) -> None:
    """The files of a tokenizer, which mean the same in every layout."""
    for pattern in ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*"):
        for file in source.glob(pattern):
            shutil.copy(file, target)
