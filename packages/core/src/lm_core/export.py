"""`final/`: a Hugging Face folder that was read back before anyone relies on it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lm_core import dist
from lm_core.errors import RunFailed
from lm_core.models import quiet, using_peft

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_core.engine.base import Engine
    from lm_core.method import Method

PROBE_TOKENS = 64
# largest difference of logits over the largest logit; sums may be ordered differently, no more
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def export(engine: Engine, method: Method, folder: Path, *, tokenizer: PreTrainedTokenizerBase | None = None, card: str = "") -> Path:
    """Write the trained model as a Hugging Face folder, read it back, and compare; returns `folder`. Every rank calls it.

    Safetensors with the config, the generation config, the tokenizer and `card` as README.md; where the model is a
    PeftModel, the adapter folder that peft loads. An existing folder is replaced as a whole once the new one is proven.
    The proof: logits of fixed tokens equal those of the trained model; under engines that shard the weights, every
    tensor is equal instead. Raises RunFailed, and writes nothing, when they are not.
    """
    model = method.final_model(engine.model)
    # a model made from the trained one stands for itself
    adapted = _peft_model(engine.model) if any(part is model for part in engine.model.modules()) else None
    outer: nn.Module = adapted if adapted is not None else model
    weights = _gathered(engine, outer)
    dist.on_main(_write, folder, model, adapted, weights, tokenizer, card)
    return folder


def _gathered(engine: Engine, part: nn.Module) -> dict[str, Tensor]:
    """Whole tensors of `part` on rank 0 by its own names, tied ones sharing memory; empty on other ranks."""
    # full_weights names tensors as the method's module does; DeepSpeed wraps that module
    built = cast(nn.Module, engine.model.module) if getattr(engine, "kind", "") == "deepspeed" else engine.model
    place = next((name for name, module in built.named_modules() if module is part), None)
    if place is None:
        # a model that the method made from the trained one
        return dict(part.state_dict()) if dist.rank() == 0 else {}
    prefix = f"{place}." if place else ""
    whole: dict[str, Tensor] = {}
    for name, tensor in engine.full_weights():
        if dist.rank() == 0 and name.startswith(prefix):
            whole[name.removeprefix(prefix)] = tensor
    first: dict[int, str] = {}
    for name, tensor in part.state_dict(keep_vars=True).items():
        if name in whole:
            whole[name] = whole[first.setdefault(id(tensor), name)]
    return whole


def _write(
    folder: Path,
    model: PreTrainedModel,
    adapted: PeftModel | None,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    card: str,
) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with quiet():
            # a copy: save_pretrained takes the tensors out of the dict it is given
            if adapted is None:
                model.save_pretrained(str(partial), state_dict=dict(weights))
            else:
                # "auto" would look for the base model on the hub, to see whether its vocabulary has grown
                targets = adapted.active_peft_config.target_modules or ()
                adapted.save_pretrained(
                    str(partial),
                    state_dict=dict(weights),
                    save_embedding_layers=any(name in targets for name in ("embed_tokens", "lm_head")),
                )
            if adapted is None:
                # engines that compute in bf16 still give float32 weights
                model.config.dtype = _dtype(weights)
                model.config.save_pretrained(str(partial))
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card)
            _prove(partial, model, adapted, weights)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prove(partial: Path, model: PreTrainedModel, adapted: PeftModel | None, weights: dict[str, Tensor]) -> None:
    if _sharded(model if adapted is None else adapted, weights):
        saved = load_file(partial / "adapter_model.safetensors") if adapted else _read_back(partial, model, weights).state_dict()
        expected = _adapter_names(weights) if adapted else weights
        wrong = [name for name, tensor in expected.items() if name not in saved or not torch.equal(saved[name].cpu(), tensor.cpu())]
        if wrong:
            raise RunFailed(f"export: {len(wrong)} tensors differ after reading them back, first {wrong[0]}; nothing was written")
        return
    read = _read_back(partial, model, weights) if adapted is None else _read_adapter(partial, model, weights)
    ours, theirs = _logits(model), _logits(read)
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30))
    # sums run in another order on another device
    allowed = TOLERANCE[model.dtype] * (1 if model.device.type == "cpu" else 10)
    if not difference <= allowed:
        raise RunFailed(
            f"export: logits of the model read back differ by {difference:.1e} of the largest logit ({allowed:.0e} allowed); nothing was written"
        )


def _sharded(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Whether this process holds only parts of the weights: of each tensor (DTensor, ZeRO-3), or some of the layers."""
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "to_local") for parameter in model.parameters()) or bool(
        weights.keys() - model.state_dict().keys()
    )


def _dtype(weights: dict[str, Tensor]) -> torch.dtype:
    return next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())


def _read_back(folder: Path, model: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """As a language model is loaded everywhere; one with another head by its own class."""
    causal = type(model).__name__.endswith("ForCausalLM") or model.get_output_embeddings() is not None  # type: ignore[no-untyped-call]
    kind: Any = AutoModelForCausalLM if causal else type(model)
    return cast("PreTrainedModel", kind.from_pretrained(folder, dtype=_dtype(weights)))


def _read_adapter(folder: Path, model: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A fresh base model with the trained run's base weights, and the adapter as peft reads it."""
    base: Any = type(model)(model.config)
    base.to(model.dtype)
    # adapters of stacked tensors lie around one another
    plain = {re.sub(r"(?:\.base_layer)+\.", ".", name.removeprefix("base_model.model.")): tensor for name, tensor in weights.items()}
    base.load_state_dict(plain, strict=False)
    with using_peft() as peft:
        return cast("PreTrainedModel", peft.PeftModel.from_pretrained(base, str(folder)))


def _adapter_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".default.", "."): tensor for name, tensor in weights.items() if "lora_" in name}


def _logits(model: PreTrainedModel) -> Tensor:
    """Logits (1 x T x V, float32, CPU) of fixed tokens, with dropout off."""
    config = model.config.get_text_config()
    length = min(PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    tokens = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            # a cache would only cost memory; models without a decoder have none
            cache = {} if model.config.is_encoder_decoder or not hasattr(model.config, "use_cache") else {"use_cache": False}
            return cast(Tensor, model(input_ids=tokens.to(model.device), **cache).logits.float().cpu())
    finally:
        model.train(training)


def _peft_model(module: nn.Module) -> PeftModel | None:
    # a PeftModel cannot exist before peft is imported, and importing it costs a second
    peft = sys.modules.get("peft")
    return None if peft is None else next((part for part in module.modules() if isinstance(part, peft.PeftModel)), None)
