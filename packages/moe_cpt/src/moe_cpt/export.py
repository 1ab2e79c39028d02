"""A mixture as a folder that stock transformers load, compared with the mixture in a fresh process."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from lm_core.errors import ConfigError, InputError, RunFailed
from lm_core.export import PROBE_TOKENS, TOLERANCE
from lm_core.models import merged as merged_adapter
from lm_core.models import model_folder, quiet
from moe_cpt.adapters import from_adapter
from moe_cpt.convert import copy_tokenizer
from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.inspection import load_mixture
from moe_cpt.model import LlamaMoEForCausalLM, MoEBlock
from moe_cpt.options.conversion import ExportConfig
from moe_cpt.split import FILE, Split
from moe_cpt.targets import require_free

Stock = TypeVar("Stock", bound=PreTrainedModel)
# fields of a LLaMA config that mean the same in Mixtral and GraniteMoeShared
_COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings",
    "initializer_range", "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    "rope_parameters", "attention_dropout", "dtype",
)  # fmt: skip
_CODE = ("configuration_llama_moe.py", "modeling_llama_moe.py")
_CHECK = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
with torch.no_grad():
    logits = model(load_file(ids)["ids"]).logits.float().contiguous()
save_file({"logits": logits}, out)
"""


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the folder that `config` describes; what was written and the largest difference of its logits.

    Raises ConfigError for a format the mixture does not fit into, RunFailed when the logits differ; nothing is written then.
    """
    target = config.save_path
    require_free("save_path", target, config.overwrite)
    source = model_folder(config.model)
    model = load_mixture(config.model)
    if config.peft_path is not None:
        with_adapter = from_adapter(model, config.peft_path)
        model = cast(LlamaMoEForCausalLM, merged_adapter(with_adapter)).train(False)
    # load_mixture reads in float32; what is written has the type of the checkpoint
    stored = getattr(torch, str(json.loads((source / "config.json").read_text()).get("dtype") or "float32"))
    model = model.to(stored)
    partial = target.with_name(target.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rounding = 0.0
        if config.format == "llama_moe":
            require_inference(model.config)
            _write_own(model, partial, keep_noise=config.keep_noise)
        elif config.format == "llama":
            split = _split_of(source)
            with quiet():
                merged(model, split).save_pretrained(partial)
            as_dense(model)
        else:
            require_fit(model.config, config.format)
            rounding = max(_rounding(block.experts.down_proj, factor_of(block)) for block in model.blocks())
            with quiet():
                (mixtral(model) if config.format == "mixtral" else granite(model)).save_pretrained(partial)
        copy_tokenizer(source, partial)
        difference = compare(model, partial)
        allowed = max(TOLERANCE[stored], 2 * rounding)
        if not difference <= allowed:
            raise RunFailed(
                f"format: logits of the {config.format} folder differ by {difference:.2g} (allowed: {allowed:.2g}); report this"
            )
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if rounding:
        print(f"score_scale_factor: folded with a rounding of at most {rounding:.2g}, since it is no power of two")
    print(f"{target}: {config.format}, largest difference of logits {difference:.2g} of the largest logit")
    return {"save_path": str(target), "format": config.format, "difference": difference, "rounding": rounding}


def require_fit(config: LlamaMoEConfig, format: str) -> None:
    """Raise ConfigError where a stock class cannot compute what the mixture does, and say which format can."""
    problem = None
    if config.gate_type != "TopKBalancedNoisyGate":
        problem = f"its gate is a {config.gate_type}"
    elif len(config.converted) < config.num_hidden_layers:
        problem = "some of its layers are dense"
    elif config.may_drop:
        problem = "its experts drop tokens"
    elif config.gate_network != "linear":
        problem = "its router is an mlp"
    elif not (config.gate_use_softmax and config.multiply_gate_scores):
        problem = "its scores are not a softmax"
    elif config.attention_bias:
        problem = "its attention has biases"
    elif config.size_experts is not None and len({size for layer in config.size_experts for size in layer}) > 1:
        problem = "its experts differ in size"
    if problem is not None:
        raise ConfigError(f"format: {format} cannot hold this mixture, since {problem}; use --format llama_moe")
    if format == "mixtral" and config.num_shared_experts:
        raise ConfigError("format: mixtral has no shared experts; use --format granitemoeshared, or llama_moe")
    if format == "granitemoeshared" and not config.num_shared_experts:
        raise ConfigError("format: granitemoeshared wants shared experts, this mixture has none; use --format mixtral")


def require_inference(config: LlamaMoEConfig) -> None:
    """Raise ConfigError for what only makes sense in training: draws that depend on the number of a sample."""
    if config.gate_type.startswith("Random") or config.may_drop:
        what = "drops random tokens" if config.may_drop else f"has a {config.gate_type}"
        raise ConfigError(f"format: the mixture {what}, which no exported code repeats; train it with another gate, or without dropping")


def mixtral(model: LlamaMoEForCausalLM) -> MixtralForCausalLM:
    """The same function as a Mixtral: scales in the down projections. Softmax over all experts, renormalised over the top K, is softmax over them."""
    config = model.config
    made = MixtralConfig(
        **_common(config),
        head_dim=config.head_dim,
        sliding_window=None,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.num_selects,
        intermediate_size=config.stored_size,
        router_aux_loss_coef=config.gate_balance_loss_weight,
    )
    tensors = {}
    for name, tensor in model.state_dict().items():
        if ".mlp.router.proj." in name:
            tensors[name.replace("router.proj", "gate")] = tensor
        elif ".mlp." not in name:
            tensors[name] = tensor
    for block in model.blocks():
        gate_up, down = routed_tensors(block)
        prefix = f"model.layers.{block.layer_idx}.mlp.experts."
        tensors |= {prefix + "gate_up_proj": gate_up, prefix + "down_proj": down}
    return _loaded(MixtralForCausalLM, made, tensors, model)


def granite(model: LlamaMoEForCausalLM) -> GraniteMoeSharedForCausalLM:
    """The same function as a GraniteMoeShared whose multipliers do nothing."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    if config.head_dim != head_dim:
        raise ConfigError(f"format: granitemoeshared wants heads of {head_dim}, not {config.head_dim}; use --format llama_moe")
    made = GraniteMoeSharedConfig(
        **_common(config),
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.num_selects,
        intermediate_size=config.stored_size,
        shared_intermediate_size=config.num_shared_experts * config.stored_size,
        router_aux_loss_coef=config.gate_balance_loss_weight,
        attention_multiplier=head_dim**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
    )
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    for block in model.blocks():
        prefix = f"model.layers.{block.layer_idx}."
        gate_up, down = routed_tensors(block)
        tensors |= {
            prefix + "block_sparse_moe.router.weight": block.router.proj.weight,
            prefix + "block_sparse_moe.experts.gate_up_proj": gate_up,
            prefix + "block_sparse_moe.experts.down_proj": down,
            prefix + "shared_mlp.input_linear.weight": block.shared_experts.gate_up_proj.weight,
            prefix + "shared_mlp.output_linear.weight": scaled(block.shared_experts.down_proj.weight, config.shared_scale_factor),
        }
    return _loaded(GraniteMoeSharedForCausalLM, made, tensors, model)


def merged(model: LlamaMoEForCausalLM, split: Split) -> LlamaForCausalLM:
    """The dense LLaMA with every expert's neurons at their original places."""
    fields = {name: value for name, value in model.config.to_dict().items() if name in LlamaConfig().to_dict() and name != "model_type"}
    made = LlamaConfig(**fields | {"architectures": ["LlamaForCausalLM"]})
    mixed = tuple(f"model.layers.{layer}.mlp." for layer in model.config.converted)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(mixed)}
    stored = model.config.stored_size
    for block in model.blocks():
        routed, shared = split.layer(block.layer_idx)
        gate_up, down = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
        gate = gate_up.new_empty(model.config.intermediate_size, model.config.hidden_size)
        up, back = torch.empty_like(gate), torch.empty_like(gate)
        for expert, neurons in enumerate(routed):
            size = len(neurons)
            gate[neurons], up[neurons] = gate_up[expert, :size], gate_up[expert, stored : stored + size]
            back[neurons] = down[expert, :, :size].T
        if len(shared):
            wide, narrow = block.shared_experts.gate_up_proj.weight.detach(), block.shared_experts.down_proj.weight.detach()
            half = len(wide) // 2
            gate[shared], up[shared] = wide[: len(shared)], wide[half : half + len(shared)]
            back[shared] = narrow[:, : len(shared)].T
        prefix = f"model.layers.{block.layer_idx}.mlp."
        tensors |= {
            prefix + "gate_proj.weight": gate,
            prefix + "up_proj.weight": up,
            prefix + "down_proj.weight": back.T.contiguous(),
        }
    return _loaded(LlamaForCausalLM, made, tensors, model)


def as_dense(model: LlamaMoEForCausalLM) -> None:
    """Make the mixture compute the dense function: all experts, equal scores, a factor of N."""
    model.set_num_selects(model.config.num_experts)
    model.set_score_scale_factor(float(model.config.num_experts))
    model.config.gate_use_softmax = model.config.multiply_gate_scores = True
    model.config.calculator_type = "UniversalCalculator"
    model.config.shared_scale_factor = 1.0
    if model.config.gate_type != "UniformPlainGate":
        model.config.gate_type = "UniformLearnableGate" if model.config.has_router else "UniformPlainGate"
    model.reset_router(std=0.0)


def routed_tensors(block: MoEBlock) -> tuple[Tensor, Tensor]:
    """Gate-up and down projections of a layer's experts, the scale in the down projections.

    Zero neurons that align the experts stay: transformers' grouped products want rows of 16 bytes, too.
    """
    return block.experts.gate_up_proj, scaled(block.experts.down_proj, factor_of(block))


def factor_of(block: MoEBlock) -> float:
    """What the routed experts' output is multiplied with, learned or not."""
    return float(torch.as_tensor(block.scale()).detach())


def scaled(weight: Tensor, factor: float) -> Tensor:
    """`weight` times `factor`, in float32, rounded once."""
    return (weight.detach().float() * factor).to(weight.dtype)


def compare(model: LlamaMoEForCausalLM, folder: Path) -> float:
    """Largest difference of logits on fixed random tokens over the largest logit; the folder is read by a process that knows nothing of us."""
    ids = torch.randint(0, model.config.vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids).logits.float()
    probe, answer = folder.with_name(folder.name + ".ids"), folder.with_name(folder.name + ".logits")
    save_file({"ids": ids}, probe)
    try:
        command = [sys.executable, "-c", _CHECK, str(folder), str(probe), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunFailed(f"format: the exported folder does not load ({done.stderr.strip().splitlines()[-1]}); report this")
        theirs = load_file(answer)["logits"]
    finally:
        probe.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)
    return float((ours - theirs).abs().max() / ours.abs().max())


def _write_own(model: LlamaMoEForCausalLM, folder: Path, *, keep_noise: bool) -> None:
    """The folder with its own code."""
    noisy = model.config.gate_add_noise
    tensors = {name: tensor for name, tensor in model.state_dict().items() if keep_noise or ".router.noise." not in name}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    model.config.gate_add_noise = noisy and keep_noise
    model.config.auto_map = {
        "AutoConfig": "configuration_llama_moe.LlamaMoEConfig",
        "AutoModelForCausalLM": "modeling_llama_moe.LlamaMoEForCausalLM",
    }
    with quiet():
        model.save_pretrained(folder, state_dict=tensors)
    for name in _CODE:
        shutil.copy2(Path(__file__).parent / "hf" / name, folder / name)


def _split_of(folder: Path) -> Split:
    path = folder / FILE
    if not path.is_file():
        raise InputError(
            f"model: {folder} holds no {FILE}, so nobody knows where its neurons were; use another format, or copy the file there"
        )
    split = Split.load(path)
    if not split.partition:
        raise InputError(
            f"model: experts of {folder} share neurons or lack some, so there is no dense model to go back to; use another format"
        )
    return split


def _common(config: LlamaMoEConfig) -> dict[str, Any]:
    fields = config.to_dict()
    return {name: fields[name] for name in _COMMON if name in fields}


def _loaded(cls: type[Stock], config: Any, tensors: Mapping[str, Tensor], model: LlamaMoEForCausalLM) -> Stock:
    """A stock model with these weights; every tensor of it is given."""
    made: Any = cls(config)
    made.to(model.dtype)
    given = {name: tensor.detach() for name, tensor in tensors.items()}
    missing, unexpected = made.load_state_dict(given, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if name != "lm_head.weight" or not config.tie_word_embeddings], missing
    made.tie_weights()
    found: Stock = made
    return found


def _rounding(weight: Tensor, factor: float) -> float:
    """Largest relative error of folding `factor` into `weight`."""
    if math.frexp(factor)[0] == 0.5:
        return 0.0
    exact = weight.detach().double() * factor
    return float(((scaled(weight, factor).double() - exact).abs() / exact.abs().clamp(min=1e-30)).max())
