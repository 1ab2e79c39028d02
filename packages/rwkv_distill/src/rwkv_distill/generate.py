"""Text from a student, one token at a time, with a state whose size does not depend on the length of the text.

B sequences, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_distill.hf.modeling_rwkv_distill import RwkvDistillForCausalLM, RwkvState


@torch.no_grad()
def generate(
    model: RwkvDistillForCausalLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 42,
    eos_token_id: int | None = None,
    state: RwkvState | None = None,
    stream: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """New tokens (B x at most `max_new_tokens`) behind the prompts `input_ids` (B x T, padding on the left where there is any).

    Temperature 0 takes the likeliest token; above it tokens are drawn from the `top_k` likeliest (0: all) and from the fewest that
    hold `top_p` of the mass. Tokens of prompt and answer are `repetition_penalty` times less likely, as in transformers. A sequence
    that has ended is filled with `eos_token_id`. `state` continues an earlier text and is advanced; `stream` is called with every
    new column. The state holds no tokens, so a repetition penalty knows those of `input_ids` alone.
    """
    generator = torch.Generator(input_ids.device).manual_seed(seed)
    # one flag per vocabulary entry, so that memory does not grow with the text
    used_BV = torch.zeros(len(input_ids), model.config.vocab_size, dtype=torch.bool, device=input_ids.device)
    mark = input_ids if attention_mask is None else input_ids.where(attention_mask.bool(), input_ids[:, -1:])
    used_BV.scatter_(1, mark, True)
    ended_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    out = model(input_ids, attention_mask, state=state, return_state=True, logits_to_keep=1)
    written = []
    for _ in range(max_new_tokens):
        logits_BV = penalised(out.logits[:, -1].float(), used_BV, repetition_penalty)
        token_B = choose(logits_BV, temperature, top_p, top_k, generator)
        if eos_token_id is not None:
            token_B = token_B.masked_fill(ended_B, eos_token_id)
            ended_B |= token_B == eos_token_id
        written.append(token_B)
        used_BV.scatter_(1, token_B[:, None], True)
        if stream is not None:
            stream(token_B)
        if len(written) == max_new_tokens or (eos_token_id is not None and bool(ended_B.all())):
            break
        out = model(token_B[:, None], state=out.state)
    return torch.stack(written, 1) if written else input_ids.new_zeros(len(input_ids), 0)


def penalised(logits_BV: Tensor, used_BV: Tensor, penalty: float) -> Tensor:
    """Positive logits of used tokens divided by the penalty, negative ones multiplied."""
    if penalty == 1:
        return logits_BV
    return torch.where(used_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def choose(logits_BV: Tensor, temperature: float, top_p: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token per sequence."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if top_k > 0:
        least = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.softmax(-1).sort(-1, descending=True)
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        logits_BV = logits_BV.masked_fill(torch.zeros_like(beyond_BV).scatter(1, order_BV, beyond_BV), -torch.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]
