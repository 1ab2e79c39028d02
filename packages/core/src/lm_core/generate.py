"""Text from a model, for `sample.txt`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """`prompt` with its continuation: the likeliest tokens, or drawn at `temperature` above 0 from `seed`.

    Stops at the end-of-text token, after `max_new_tokens`, or where the model's positions end; a prompt longer than
    those keeps its last tokens. Leaves torch's generators and the model's mode as they were.
    """
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[start or 0]])
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or ids.shape[1] + max_new_tokens
    new = min(max_new_tokens, positions - 1)
    ids = ids[:, -(positions - new) :].to(model.device)
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    end = tokenizer.eos_token_id
    training = model.training
    model.train(False)
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            writer: Any = model
            written = writer.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                eos_token_id=end,
                pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
                **options,
            )
    finally:
        model.train(training)
    return prompt + str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
