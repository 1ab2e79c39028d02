"""`lowrank-opt export`: a checkpoint as a Hugging Face or adapter folder."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lm_core.errors import ConfigError
from lm_core.export import export
from lm_core.models import adapted, merged
from lowrank_opt import saved
from lowrank_opt.commands import ExportConfig
from lowrank_opt.method import LowRank, method_for
from lowrank_opt.resolve import again

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def exported(method: LowRank, merge: bool, dtype: torch.dtype | None) -> LowRank:
    """`method`, whose final model is merged and cast as an export asks."""
    plain = method.final_model

    def final_model(model: nn.Module) -> PreTrainedModel:
        chosen = merged(model, dtype) if merge else plain(model)
        if dtype is None or dtype == chosen.dtype:
            return chosen
        copied: nn.Module = copy.deepcopy(chosen)
        return cast("PreTrainedModel", copied.to(dtype))

    method.final_model = final_model  # type: ignore[method-assign]
    return method


def run(config: ExportConfig) -> dict[str, Any]:
    """Write the folder; with --merge, also how far its logits are from those of the model with adapters."""
    saved.refuse_existing(config.out)
    checkpoint = saved.newest(config.checkpoint)
    options = saved.options(checkpoint, {})
    adapters = options.optimizer.startswith("lora")
    if config.merge and not adapters:
        raise ConfigError(f"merge: the run trained {options.optimizer}, which has no adapters; drop --merge")
    if config.dtype != "auto" and adapters and not config.merge and options.mode == "finetuning":
        raise ConfigError(f"dtype: adapters are written as they were trained, not in {config.dtype}; add --merge")
    method = exported(method_for(again(options, per_layer=False)), config.merge, DTYPES.get(config.dtype))
    engine, _ = saved.load(checkpoint, options, method)
    steps = saved.progress(checkpoint)["steps"]
    card = f"# {config.out.name}\n\n`{options.model}` trained with {options.optimizer}, step {steps}.\n"
    config.out.parent.mkdir(parents=True, exist_ok=True)
    export(engine, method, config.out, tokenizer=method.tokenizer(), card=card)
    found: dict[str, Any] = {"out": str(config.out), "step": steps}
    if config.merge:
        found["largest_logit_difference"] = difference(engine.model, method.final_model(engine.model))
        print(f"merged: logits differ from those of the adapters by at most {found['largest_logit_difference']:.2g}")
    print(f"{config.out}: step {steps}")
    return found


@torch.no_grad()
def difference(trained: nn.Module, written: PreTrainedModel) -> float:
    """Largest difference of logits on fixed tokens, in float32: what merging and casting have done to the weights."""
    vocabulary = written.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (1, 64), generator=torch.Generator().manual_seed(0)).to(written.device)
    logits: list[Tensor] = [copy.deepcopy(part).float().eval()(input_ids=tokens).logits for part in (adapted(trained), written)]
    return float((logits[0] - logits[1]).abs().max())
