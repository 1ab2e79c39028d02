"""What replaces attention: the options of a student, and what they come to for a given teacher. Free of torch."""

from __future__ import annotations

from typing import Any, Literal

from lm_core.config import config, opt
from lm_core.errors import ConfigError

# a preset is a set of these fields; an option that is given wins
PRESETS: dict[str, dict[str, Any]] = {
    "arwkv": {
        "head_size": 64, "kv_heads": "expanded", "qkv_bias": False, "rope": False, "token_shift": True, "group_norm": False,
        "gate": "residual", "wkv_scale": False, "value_residual": True, "bonus": True,
    },
    "rad": {
        "head_size": None, "kv_heads": "grouped", "qkv_bias": True, "rope": True, "token_shift": False, "group_norm": True,
        "gate": "residual", "wkv_scale": True, "value_residual": True, "bonus": False,
    },
}  # fmt: skip
RANKS = ("decay", "iclr", "value", "gate")
TEACHERS = ("llama", "mistral", "qwen2", "qwen3")


@config
class StudentConfig:
    """Section `student`: the fields of a preset, each of which may be given alone; unset ones come from the preset."""

    layers: list[int] | Literal["all"] = opt("all", "Decoder layers whose attention is replaced; the others keep softmax attention.")
    rwkv_version: Literal["v6", "v7"] = opt("v7", "Kind of time mixing.", flags=("-R",))
    preset: Literal["arwkv", "rad"] = opt("arwkv", "Values of the fields that are not given.")
    head_size: Literal[32, 64, 128] | None = opt(None, "Size of a head of the state; preset: arwkv 64, rad that of the teacher.")
    kv_heads: Literal["expanded", "grouped"] | None = opt(None, "Own keys and values per head, or shared as by the teacher.")
    qkv_bias: bool | None = opt(None, "Keep the teacher's biases of queries, keys and values, if it has any.")
    qk_norm: Literal["auto", "none"] = opt("auto", "Keep the teacher's norm of queries and keys, if it has one.")
    rope: bool | None = opt(None, "Rotate receptance and key as the teacher does; needs the teacher's head size.")
    token_shift: bool | None = opt(None, "Mix every input with the one before it.")
    group_norm: bool | None = opt(None, "Normalise the output of every head.", flags=("-M",))
    gate: Literal["none", "sigmoid", "residual"] | None = opt(None, "Factor of the output computed from the input.")
    wkv_scale: bool | None = opt(None, "Divide the output by the root of the head size, where it is not normalised.")
    value_residual: bool | None = opt(None, "Mix the value of the first RWKV layer into later ones.")
    bonus: bool | None = opt(None, "Add the current token once more, by a learned weight.")
    lora: dict[str, int | None] | Literal["auto"] = opt(
        help="Ranks as decay=64,iclr=64,value=32,gate=128; or auto, from the hidden size. A residual gate has 127 by default.",
        factory=dict,
    )
    init: Literal["copy", "random"] = opt("copy", "Projections copied from the teacher's attention, or random.")
    token_shift_init: Literal["zero", "rwkv"] | None = opt(None, "Initial token shift: none, or RWKV's; default: zero with --init copy.")

    def check(self) -> None:
        if isinstance(self.layers, list):
            if len(set(self.layers)) < len(self.layers):
                raise ConfigError(f"layers: {self.layers} names a layer twice; name each once")
            if any(layer < 0 for layer in self.layers):
                raise ConfigError(f"layers: {min(self.layers)} is no index of a layer; count from 0")
        if isinstance(self.lora, dict):
            if strange := set(self.lora) - set(RANKS):
                raise ConfigError(f"lora: {sorted(strange)[0]} is no low-rank part; known: {', '.join(RANKS)}")
            if small := [name for name, rank in self.lora.items() if rank is not None and rank < 1]:
                raise ConfigError(f"lora: the rank of {small[0]} is {self.lora[small[0]]}; use at least 1")

    def field(self, name: str) -> Any:
        """A field of the preset, unless it is given."""
        value = getattr(self, name)
        return PRESETS[self.preset][name] if value is None else value


def resolve(student: StudentConfig, teacher: Any, *, bias: bool, output_bias: bool, qk_norm: bool) -> dict[str, Any]:
    """Every field of the student of this teacher, as `RwkvDistillConfig.student` holds them.

    `bias`, `output_bias`, `qk_norm`: what the teacher's attention has. Raises ConfigError where student and teacher do not fit.
    """
    if teacher.model_type not in TEACHERS:
        raise ConfigError(f"model: a teacher of type {teacher.model_type} is not supported; use one of {', '.join(TEACHERS)}")
    head_dim = int(getattr(teacher, "head_dim", None) or teacher.hidden_size // teacher.num_attention_heads)
    width = teacher.num_attention_heads * head_dim
    layers = list(range(teacher.num_hidden_layers)) if student.layers == "all" else sorted(student.layers)
    if layers and layers[-1] >= teacher.num_hidden_layers:
        raise ConfigError(f"layers: {layers[-1]} is out of range; the teacher has layers 0 to {teacher.num_hidden_layers - 1}")
    size = student.field("head_size") or head_dim
    if width % size:
        raise ConfigError(f"head_size: {size} does not divide the teacher's width of {width}; use {' or '.join(_divisors(width))}")
    if size not in (32, 64, 128):
        raise ConfigError(f"head_size: the teacher's {size} is not a size that operators have; add --head-size 32, 64 or 128")
    if student.field("rope") and size != head_dim:
        raise ConfigError(f"rope: rotation needs heads of the teacher's size {head_dim}, not {size}; add --head-size {head_dim}")
    if student.field("kv_heads") == "grouped" and size > head_dim and teacher.num_key_value_heads < teacher.num_attention_heads:
        raise ConfigError(f"kv_heads: heads of {size} mix shared heads of {head_dim}; use expanded, or --head-size {head_dim}")
    gate = student.field("gate")
    fields = {name: student.field(name) for name in PRESETS["arwkv"]}
    return fields | {
        "version": student.rwkv_version,
        "layers": layers,
        "head_size": size,
        "qkv_bias": bool(student.field("qkv_bias")) and bias,
        "output_bias": bool(student.field("qkv_bias")) and output_bias,
        "qk_norm": student.qk_norm == "auto" and qk_norm,
        "ranks": _ranks(student.lora, teacher.hidden_size, gate),
    }


def _ranks(lora: Any, hidden: int, gate: str) -> dict[str, int]:
    if lora == "auto":
        factors = {"decay": 2.5, "iclr": 2.5, "value": 1.7, "gate": 5.0}
        return {name: max(32, 32 * round(factor * hidden**0.5 / 32)) for name, factor in factors.items()}
    # an ARWKV checkpoint has room for 128 columns, of which a residual gate uses one for its constant
    standard = {"decay": 64, "iclr": 64, "value": 32, "gate": 127 if gate == "residual" else 128}
    return {name: lora.get(name) or rank for name, rank in standard.items()}


def _divisors(width: int) -> list[str]:
    return [str(size) for size in (32, 64, 128) if width % size == 0] or ["a teacher of another width"]
