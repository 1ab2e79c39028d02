"""Text from a model, token by token; every draw has an address, so a sample does not depend on what is drawn beside it.

B samples, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lm_core.errors import InputError
from lm_core.models import load_tokenizer
from mdm_scaling.config import GenerateConfig, to_json
from mdm_scaling.model import checkpoint_folder, load_network, objective_of, vocabulary_of
from mdm_scaling.noise import unit, words

logger = logging.getLogger(__name__)


def run(config: GenerateConfig) -> dict[str, Any]:
    """Continue every prompt; prints the texts and writes one JSON line per sample."""
    model = load_network(config.checkpoint)
    tokenizer = load_tokenizer(checkpoint_folder(config.checkpoint))
    if objective_of(model) != "ar":
        raise InputError(f"checkpoint: {config.checkpoint} is a masked model; only autoregressive ones can be sampled")
    results = []
    for number, prompt in enumerate(config.prompts()):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids or [tokenizer.eos_token_id or 0]
        positions = int(model.config.max_position_embeddings)
        if len(ids) + config.max_new_tokens > positions:
            raise InputError(
                f"max_new_tokens: {len(ids)} + {config.max_new_tokens} tokens are more than the {positions} positions; ask for fewer"
            )
        began = time.perf_counter()
        index = torch.arange(config.num_samples) + number * config.num_samples
        tokens, logprobs, evaluations = autoregressive(
            model, torch.tensor([ids] * config.num_samples), config.max_new_tokens, index=index, temperature=config.temperature,
            top_k=config.top_k, top_p=config.top_p, seed=config.seed, end=tokenizer.eos_token_id,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        for row, scores in zip(tokens, logprobs):
            text = str(tokenizer.decode(row, skip_special_tokens=True))
            results.append(
                {
                    "prompt": prompt, "text": text, "tokens": row, "logprobs": scores, "sampler": "ar",
                    "evaluations": evaluations, "seconds": seconds,
                }
            )  # fmt: skip
            print(prompt + text)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text("".join(to_json(result) + "\n" for result in results))
    return {"samples": results}


@torch.no_grad()
def autoregressive(
    model: PreTrainedModel, prompt_BT: Tensor, count: int, *, index: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
    seed: int = 0, end: int | None = None, cache: bool = True,
) -> tuple[list[list[int]], list[list[float]], int]:  # fmt: skip
    """(tokens, log-probabilities, network evaluations) of `count` tokens behind each prompt, or up to the end token.

    `index` (B) is the address of each sample's draws. With `cache` keys and values of earlier positions are kept, which
    changes nothing but the time.
    """
    vocabulary = vocabulary_of(model)
    tokens: list[list[int]] = [[] for _ in prompt_BT]
    logprobs: list[list[float]] = [[] for _ in prompt_BT]
    done = torch.zeros(len(prompt_BT), dtype=torch.bool)
    ids, past = prompt_BT, None
    network: Any = model
    for step in range(count):
        output = network(input_ids=ids if past is None else ids[:, -1:], past_key_values=past, use_cache=cache, logits_to_keep=1)
        past = output.past_key_values if cache else None
        drawn, score = choose(
            output.logits[:, -1, :vocabulary], index, torch.full((len(ids),), step), seed, temperature=temperature, top_k=top_k, top_p=top_p
        )
        for row in (~done).nonzero()[:, 0].tolist():
            tokens[row].append(int(drawn[row]))
            logprobs[row].append(float(score[row]))
        done |= drawn == end if end is not None else False
        ids = torch.cat([ids, drawn[:, None]], dim=1)
        if bool(done.all()):
            break
    return tokens, logprobs, step + 1


def choose(
    logits_BV: Tensor, index_B: Tensor, at_B: Tensor, seed: int, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A token for each row and its log-probability under the plain model (float64).

    Temperature 0 takes the likeliest token, the lowest id on ties. Above it, one uniform draw at (seed, sampling, index,
    position) picks from the cumulative distribution of the tokens that `top_k` and `top_p` leave, likeliest first.
    """
    logits = logits_BV.double()
    plain = logits.log_softmax(-1)
    if temperature == 0:
        chosen = logits.argmax(-1)
        return chosen, plain.gather(1, chosen[:, None])[:, 0]
    sorted_p, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k:
        sorted_p[:, top_k:] = 0
    if top_p < 1:
        before = sorted_p.cumsum(-1) - sorted_p
        sorted_p[before >= top_p] = 0
    cumulative = sorted_p.cumsum(-1)
    draws = torch.cat([words(seed, "sampling", i[None], int(at) >> 2, 4)[:, int(at) & 3] for i, at in zip(index_B, at_B)])
    at = torch.searchsorted(cumulative, unit(draws)[:, None] * cumulative[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    chosen = order.gather(1, at)[:, 0]
    return chosen, plain.gather(1, chosen[:, None])[:, 0]
