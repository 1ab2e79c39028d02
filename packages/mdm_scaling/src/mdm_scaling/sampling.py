"""Text from a model, token by token or mask by mask; every draw has an address, so a sample does not depend on what is drawn beside it.

B samples, T positions, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kernels_cuda.mdm import reveal_tokens
from lm_core import counter
from lm_core.errors import InputError
from lm_core.models import load_tokenizer
from mdm_scaling.model import checkpoint_folder, load_network, objective_of, vocabulary_of
from mdm_scaling.noise import WHOLE, at, signed, unit
from mdm_scaling.options import GenerateConfig

logger = logging.getLogger(__name__)


# what is told of each step: rows and columns that it revealed, tokens, log-probabilities
Trace = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
MASK = "[MASK]"
Sampler = Literal["ancestral", "first-hitting", "confidence", "ar"]
Remasking = Literal["low-confidence", "random", "margin", "entropy"]


def run(config: GenerateConfig) -> dict[str, Any]:
    """Continue every prompt, or fill its [MASK]s; prints the texts and writes one JSON line per sample."""
    model = load_network(config.checkpoint)
    tokenizer = load_tokenizer(checkpoint_folder(config.checkpoint))
    masks = objective_of(model) == "mdm"
    sampler: Sampler = config.sampler or ("confidence" if masks else "ar")
    if masks == (sampler == "ar"):
        kind = "a masked model; use --sampler confidence, ancestral or first-hitting" if masks else "autoregressive; use --sampler ar"
        raise InputError(f"sampler: {config.checkpoint} is {kind}")
    if config.cache == "prefix" and not masks:
        raise InputError(f"cache: prefix is of masked models, and {config.checkpoint} is autoregressive; use --cache exact")
    results: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    for number, prompt in enumerate(config.prompts()):
        ids = encode(prompt, tokenizer, vocabulary_of(model))
        if not masks and vocabulary_of(model) in ids:
            raise InputError(f"prompt: {prompt!r} has a {MASK}, which only masked models fill")
        positions = int(model.config.max_position_embeddings)
        if len(ids) + config.max_new_tokens > positions:
            raise InputError(
                f"max_new_tokens: {len(ids)} + {config.max_new_tokens} tokens are more than the {positions} positions; ask for fewer"
            )
        began = time.perf_counter()
        index = torch.arange(config.num_samples) + number * config.num_samples
        common: dict[str, Any] = {
            "index": index,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "seed": config.seed,
            "trace": partial(_note, steps, number * config.num_samples) if config.trace is not None else None,
        }
        if sampler == "ar":
            start = torch.tensor([ids] * config.num_samples)
            tokens, logprobs, evaluations = autoregressive(
                model, start, config.max_new_tokens, end=tokenizer.eos_token_id, cache=config.cache != "none", **common
            )
            texts = [prompt + str(tokenizer.decode(row, skip_special_tokens=True)) for row in tokens]
        else:
            start = torch.tensor([ids + [vocabulary_of(model)] * config.max_new_tokens] * config.num_samples)
            options: dict[str, Any] = {"sampler": sampler, "remasking": config.remasking, "cfg_scale": config.cfg_scale, **common}
            options["reuse"] = config.cache != "none"
            predict = FinishedBlocks(model) if config.cache == "prefix" else _logits(model)
            tokens, logprobs, evaluations = fill(predict, start, vocabulary_of(model), config.steps, config.block_length, **options)
            texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in tokens]
        seconds = time.perf_counter() - began
        for text, row, scores in zip(texts, tokens, logprobs):
            results.append(
                {
                    "prompt": prompt,
                    "text": text,
                    "tokens": row,
                    "logprobs": scores,
                    "sampler": sampler,
                    "cache": "prefix (approximate)" if config.cache == "prefix" else config.cache,
                    "evaluations": evaluations,
                    "seconds": seconds,
                }
            )
            print(text)
    for path, lines in ((config.out, results), (config.trace, steps)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return {"samples": results}


def _note(steps: list[dict[str, Any]], first: int, step: int, rows: Tensor, columns: Tensor, tokens: Tensor, scores: Tensor) -> None:
    """One entry per sample that a step revealed something of."""
    for row in rows.unique().tolist():
        own = rows == row
        found = {"positions": columns[own].tolist(), "tokens": tokens[own].tolist(), "logprobs": scores[own].tolist()}
        steps.append({"sample": first + row, "step": step, **found})


def encode(prompt: str, tokenizer: Any, mask_id: int) -> list[int]:
    """The tokens of a prompt, `mask_id` for each [MASK]; the end token for an empty one."""
    ids: list[int] = []
    for number, piece in enumerate(prompt.split(MASK)):
        ids += [mask_id] * (number > 0) + (tokenizer(piece, add_special_tokens=False).input_ids if piece else [])
    return ids or [tokenizer.eos_token_id or 0]


def _logits(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    network: Any = model
    return lambda ids: cast(Tensor, network(input_ids=ids).logits)


class FinishedBlocks:
    """Logits of a masked model that keeps keys and values of everything before the block that is being filled.

    They are those of the block's first step, whatever is revealed behind them later: an approximation, except in the first of
    the layers. Logits of the places before the block are zeros.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.network: Any = model
        self.first = 0
        self.kept: DynamicCache | None = None

    def begin(self, first: int) -> None:
        """From here on places before `first` do not change."""
        self.first, self.kept = first, None

    def __call__(self, ids_BT: Tensor) -> Tensor:
        if self.first == 0:
            return cast(Tensor, self.network(input_ids=ids_BT).logits)
        start = 0 if self.kept is None else self.first
        whole = self.kept or DynamicCache()
        positions = torch.arange(start, ids_BT.shape[1])[None].expand(len(ids_BT), -1)
        everything = torch.ones(len(ids_BT), 1, ids_BT.shape[1] - start, ids_BT.shape[1], dtype=torch.bool)
        states = self.network.model(
            input_ids=ids_BT[:, start:], position_ids=positions, attention_mask=everything, past_key_values=whole, use_cache=True
        ).last_hidden_state
        logits = self.network.lm_head(states)
        whole.crop(self.first - ids_BT.shape[1])
        self.kept = whole
        return torch.cat([logits.new_zeros(len(ids_BT), start, logits.shape[2]), logits], dim=1)


@torch.no_grad()
def fill(
    predict: Callable[[Tensor], Tensor], ids_BT: Tensor, mask_id: int, steps: int, block_length: int | None = None, *, index: Tensor,
    sampler: Sampler = "confidence", remasking: Remasking = "low-confidence", temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
    cfg_scale: float = 0.0, seed: int = 0, reuse: bool = True, trace: Trace | None = None,
) -> tuple[list[list[int]], list[list[float]], int]:  # fmt: skip
    """(tokens, log-probabilities of the filled ones, network evaluations) of sequences whose masks are filled in `steps`.

    Every row has its masks at the same places. Blocks of `block_length` masks are filled from left to right; the steps are
    divided among them. confidence reveals a quota per step, the highest scores first; first-hitting the same number at random
    places; ancestral goes from t = 1 to 0 and reveals each mask with probability (t - s) / t. Nothing else ever changes.
    With `reuse` logits are kept while no token changes, which changes nothing but the number of evaluations.
    """
    ids = ids_BT.clone()
    places = (ids[0] == mask_id).nonzero()[:, 0]
    prompt = ids_BT != mask_id
    size = block_length or len(places)
    blocks = [places[first : first + size] for first in range(0, len(places), size)]
    if steps < len(blocks):
        raise InputError(
            f"steps: {steps} are fewer than the {len(blocks)} blocks; use at least one step per block, or a larger --block-length"
        )
    scores = torch.zeros(ids.shape)
    evaluations, number, known = 0, 0, None
    for part, block in enumerate(blocks):
        own = steps // len(blocks) + (part < steps % len(blocks))
        quota = [len(block) // own + (step < len(block) % own) for step in range(own)]
        if isinstance(predict, FinishedBlocks):
            predict.begin(int(block[0]))
            known = None
        for step in range(own):
            hidden = ids[:, block] == mask_id
            if not bool(hidden.any()):
                break
            if known is None:
                # while no token changes, neither do the logits
                known, evaluations = guided(predict, ids, prompt, mask_id, cfg_scale), evaluations + (2 if cfg_scale else 1)
            rows, columns = hidden.nonzero(as_tuple=True)
            logits = known[rows, block[columns]]
            address = number * ids.shape[1] + block[columns]
            drawn, plain = choose(logits, mask_id, index[rows], address, seed, temperature=temperature, top_k=top_k, top_p=top_p)
            table = torch.full(hidden.shape, -torch.inf, dtype=torch.float64)
            if sampler == "ancestral":
                chance = 1 / (own - step)
                table[rows, columns] = torch.where(_draws(seed, index[rows], address) < chance, 0.0, -torch.inf).double()
                count = torch.isfinite(table).sum(1)
            else:
                how: Remasking = "random" if sampler == "first-hitting" else remasking
                table[rows, columns] = _score(how, logits[:, :mask_id], plain, _draws(seed, index[rows], address))
                count = torch.full((len(ids),), quota[step])
            order = table.argsort(dim=1, descending=True, stable=True)
            rank = torch.empty_like(order).scatter_(1, order, torch.arange(len(block)).expand_as(order))
            reveal = (rank < count[:, None]) & hidden
            values = torch.full(hidden.shape, mask_id).index_put((rows, columns), drawn)
            logs = torch.zeros(hidden.shape).index_put((rows, columns), plain)
            ids[:, block] = torch.where(reveal, values, ids[:, block])
            scores[:, block] = torch.where(reveal, logs, scores[:, block])
            if trace is not None and bool(reveal.any()):
                shown, at_block = reveal.nonzero(as_tuple=True)
                trace(number, shown, block[at_block], values[shown, at_block], logs[shown, at_block])
            known = None if not reuse or bool(reveal.any()) else known
            number += 1
    return ids.tolist(), scores[:, places].tolist(), evaluations


def guided(predict: Callable[[Tensor], Tensor], ids: Tensor, prompt: Tensor, mask_id: int, scale: float) -> Tensor:
    """Logits, pushed away from those without the prompt: uncond + (scale + 1) (cond - uncond)."""
    cond = predict(ids)
    if not scale:
        return cond
    uncond = predict(ids.masked_fill(prompt, mask_id))
    return uncond + (scale + 1) * (cond - uncond)


def _draws(seed: int, index: Tensor, place: Tensor) -> Tensor:
    """Uniforms in [0, 1) for choosing places; their words stand beyond those of tokens."""
    return unit(at(seed, "sampling", index, place, WHOLE))


def _score(how: Remasking, logits: Tensor, plain: Tensor, draws: Tensor) -> Tensor:
    """What is revealed first, highest first."""
    if how == "random":
        return draws
    if how == "low-confidence":
        return plain.double()
    p = logits.double().softmax(-1)
    if how == "margin":
        top = p.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    return cast(Tensor, torch.special.xlogy(p, p).sum(-1))


@torch.no_grad()
def autoregressive(
    model: PreTrainedModel, prompt_BT: Tensor, count: int, *, index: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
    seed: int = 0, end: int | None = None, cache: bool = True, trace: Trace | None = None,
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
        place = torch.full((len(ids),), step)
        drawn, score = choose(output.logits[:, -1], vocabulary, index, place, seed, temperature=temperature, top_k=top_k, top_p=top_p)
        if trace is not None:
            going = (~done).nonzero()[:, 0]
            trace(step, going, torch.full_like(going, ids.shape[1]), drawn[going], score[going])
        for row in (~done).nonzero()[:, 0].tolist():
            tokens[row].append(int(drawn[row]))
            logprobs[row].append(float(score[row]))
        done |= drawn == end if end is not None else False
        ids = torch.cat([ids, drawn[:, None]], dim=1)
        if bool(done.all()):
            break
    return tokens, logprobs, step + 1


def choose(
    logits_MV: Tensor, vocabulary: int, index_M: Tensor, place_M: Tensor, seed: int, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """A token for each row and its log-probability under the plain model, by a draw at (seed, sampling, index, place)."""
    token, logprob, _ = reveal_tokens(
        logits_MV, vocabulary, temperature, top_k, top_p, signed(seed), counter.number("sampling"), index_M, place_M
    )  # fmt: skip
    return token, logprob
