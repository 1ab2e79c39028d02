"""Multiple-choice and cloze tasks: the likelihood of a target given its context, by either kind of model.

T positions of context and target together, K masked versions of one sequence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lm_core.errors import ConfigError, InputError
from lm_core.models import load_tokenizer
from mdm_scaling import losses
from mdm_scaling.model import Scorer, checkpoint_folder, load_network, objective_of, vocabulary_of
from mdm_scaling.noise import Noise, levels, masks
from mdm_scaling.options import TasksConfig
from mdm_scaling.sampling import fill

How = Literal["mc", "chain", "greedy"]


@dataclass(frozen=True)
class Item:
    """A question: texts that may follow a context, and the number of the right one; a single text is a cloze."""

    context: str
    choices: tuple[str, ...]
    answer: int


def read_items(path: Path) -> list[Item]:
    """Lines {context, choices, answer} or {context, target}. Raises InputError naming the line that is neither."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"tasks: {path} cannot be read ({error}); name a .jsonl file") from None
    items = [_item(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise InputError(f"tasks: {path} holds no item; write lines of context, choices and answer")
    return items


def _item(line: str, where: str) -> Item:
    try:
        value = json.loads(line)
        context = str(value["context"])
        if "target" in value:
            return Item(context, (str(value["target"]),), 0)
        item = Item(context, tuple(map(str, value["choices"])), int(value["answer"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"tasks: {where} lacks context, choices and answer, or context and target ({error!r}); correct the line") from None
    if not 0 <= item.answer < len(item.choices):
        raise InputError(f"tasks: {where}: the answer {item.answer} is none of {len(item.choices)} choices; count from 0")
    return item


@dataclass(frozen=True)
class Versions:
    """A target as the network sees it: K rows of inputs, what stands at each place, which places count, and each row's weight."""

    inputs_KT: Tensor
    labels_KT: Tensor
    scored_KT: Tensor
    weight_K: Tensor


def masked_versions(
    context: Sequence[int], target: Sequence[int], *, how: Literal["mc", "chain"], mask_id: int, num_mc: int, seed: int, address: int
) -> Versions:
    """For a masked model, of which only target tokens are masked.

    chain: token i given the ones before it, with everything from i to the end masked. mc: the bound over levels, `num_mc`
    stratified draws at (seed, eval, address).
    """
    ids = torch.tensor([*context, *target])
    size, first = len(target), len(context)
    own = torch.zeros(len(ids), dtype=torch.bool)
    own[first:] = True
    if how == "chain":
        hidden = torch.zeros(size, len(ids), dtype=torch.bool)
        hidden[:, first:] = torch.ones(size, size, dtype=torch.bool).triu()
        scored = torch.zeros_like(hidden)
        scored[torch.arange(size), first + torch.arange(size)] = True
        weights = torch.ones(size, dtype=torch.float64)
    else:
        slots = torch.arange(num_mc)
        t = levels("stratified", seed, "eval", address, slots, slots + address * num_mc, num_mc)
        # a fixed number of masks: unbiased for the exact bound, however short the target
        hidden, weight = masks(Noise(mode="fixed-count"), t, own.expand(num_mc, -1), seed, "eval", slots + address * num_mc)
        scored, weights = hidden, weight.double() / num_mc
    rows = ids.expand(len(hidden), -1)
    return Versions(rows.masked_fill(hidden, mask_id), rows, scored, weights)


def causal_versions(context: Sequence[int], target: Sequence[int]) -> Versions:
    """For an autoregressive model: the one row."""
    ids = torch.tensor([[*context, *target]])
    scored = torch.arange(ids.shape[1] - 1) >= len(context) - 1
    return Versions(ids[:, :-1], ids[:, 1:], scored[None], torch.ones(1, dtype=torch.float64))


@torch.no_grad()
def scores(predict: losses.Predictor, targets: Sequence[Versions], chunk: int) -> list[float]:
    """Negative log-likelihood of each target. Shorter ones get padding that nobody sees; chunks only bound the memory."""
    longest = max(target.inputs_KT.shape[1] for target in targets)
    inputs, labels, scored, seen = (
        torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])
        for parts in zip(
            *((each.inputs_KT, each.labels_KT, each.scored_KT, torch.ones_like(each.inputs_KT)) for each in targets), strict=True
        )
    )
    found = []
    for start in range(0, len(inputs), chunk):
        part = slice(start, start + chunk)
        more = {} if bool(seen[part].all()) else {"attention_mask": seen[part]}
        found.append(losses.sums(predict, inputs[part], labels[part], scored[part], **more))
    weighed = torch.cat(found) * torch.cat([target.weight_K for target in targets])
    return [float(part.sum()) for part in weighed.split([len(target.weight_K) for target in targets])]


def grouped(targets: Iterable[Versions], batch_size: str, chunk: int) -> Iterator[list[Versions]]:
    """Groups of `batch_size` targets; auto: of as many as fill a forward pass."""
    group: list[Versions] = []
    for target in targets:
        group.append(target)
        full = sum(len(each.weight_K) for each in group) >= chunk if batch_size == "auto" else len(group) == int(batch_size)
        if full:
            yield group
            group = []
    if group:
        yield group


def run(config: TasksConfig) -> dict[str, Any]:
    """Accuracies, exact matches and mean losses of one file of items, or of tasks that lm-eval knows."""
    if not config.tasks.endswith(".jsonl") and not Path(config.tasks).exists():
        return _by_harness(config)
    model = load_network(config.checkpoint)
    tokenizer = load_tokenizer(checkpoint_folder(config.checkpoint))
    masked = objective_of(model) == "mdm"
    how: How = config.how or ("mc" if masked else "chain")
    if how == "mc" and not masked:
        raise InputError(f"method: mc is the bound of masked models, and {config.checkpoint} is autoregressive; use --method chain")
    items = read_items(Path(config.tasks))[: config.limit]
    mask_id, end = vocabulary_of(model), tokenizer.eos_token_id or 0

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    asked = [(encode(item.context) or [end], [encode(choice) for choice in item.choices]) for item in items]
    for number, (context, choices) in enumerate(asked):
        _require(context, choices, int(model.config.max_position_embeddings), number)
    if how == "greedy":
        found = [
            {"exact_match": float(greedy(model, context, choices[item.answer], masked, mask_id))}
            for item, (context, choices) in zip(items, asked)
        ]
        return _report(config, found, how, bound=False)

    def versions() -> Iterator[Versions]:
        for number, (context, choices) in enumerate(asked):
            for at, choice in enumerate(choices):
                if masked:
                    address = number * 64 + at
                    yield masked_versions(
                        context, choice, how=how, mask_id=mask_id, num_mc=config.num_mc, seed=config.eval_seed, address=address
                    )  # fmt: skip
                else:
                    yield causal_versions(context, choice)

    scorer, chunk = Scorer(model).eval(), config.max_chunk_size
    nll = iter([value for group in grouped(versions(), config.batch_size, chunk) for value in scores(scorer, group, chunk)])
    found = []
    for item, (_, choices) in zip(items, asked):
        measured = _measures(item, [next(nll) for _ in choices], [len(choice) for choice in choices])
        found.append({name: value for name, value in measured.items() if not config.only_mc_nll or name.startswith("nll")})
    return _report(config, found, how, bound=masked and how == "mc")


def _by_harness(config: TasksConfig) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness by their names."""
    if config.how is not None:
        raise ConfigError("method: tasks of lm-eval say themselves what they measure; drop --method and --only-..., or name a .jsonl file")
    try:
        from lm_eval import simple_evaluate
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tasks: there is no file {config.tasks}, and {error.name}, which knows tasks by name, is not installed; run pip install 'lm_eval>=0.4.9'"
        ) from None
    from mdm_scaling.harness import MdmScaling

    model = MdmScaling(config.checkpoint, num_mc=config.num_mc, seed=config.eval_seed, chunk=config.max_chunk_size)
    found = simple_evaluate(model=model, tasks=config.tasks.split(","), limit=config.limit)["results"]
    for task, values in found.items():
        for name, value in values.items():
            if isinstance(value, float):
                print(f"{task}  {name:30} {value:.4f}")
    return {"tasks": config.tasks, "results": found}


def _require(context: Sequence[int], choices: Sequence[Sequence[int]], positions: int, number: int) -> None:
    longest = len(context) + max(map(len, choices))
    if longest > positions:
        raise InputError(f"tasks: item {number} has {longest} tokens, more than the {positions} positions of the model; shorten it")
    if not all(choices):
        raise InputError(f"tasks: item {number} has an empty choice; write at least one character")


def _measures(item: Item, nll: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    per_token = [value / length for value, length in zip(nll, lengths)]
    found = {"nll": nll[item.answer], "nll_per_token": per_token[item.answer]}
    if len(nll) > 1:
        found["accuracy"] = float(min(range(len(nll)), key=lambda at: nll[at]) == item.answer)
        found["accuracy_by_length"] = float(min(range(len(nll)), key=lambda at: per_token[at]) == item.answer)
    return found


def greedy(model: Any, context: Sequence[int], target: Sequence[int], masked: bool, mask_id: int) -> bool:
    """Whether the likeliest continuation is the target."""
    if masked:
        predict: Callable[[Tensor], Tensor] = lambda ids: model(input_ids=ids).logits  # noqa: E731
        start = torch.tensor([[*context, *[mask_id] * len(target)]])
        return fill(predict, start, mask_id, len(target), index=torch.arange(1))[0][0][len(context) :] == list(target)
    ids = torch.tensor([[*context, *target]])
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(context) - 1 :, :mask_id]
    return bool((logits.argmax(-1) == torch.tensor(target)).all())


def _report(config: TasksConfig, found: Sequence[Mapping[str, float]], how: How, *, bound: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"tasks": config.tasks, "method": how, "items": len(found), "bound": bound}
    for name in dict.fromkeys(name for scores in found for name in scores):
        values = torch.tensor([scores[name] for scores in found if name in scores], dtype=torch.float64)
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
        result[name], result[f"{name}_standard_error"] = float(values.mean()), error
        print(
            f"{name:20} {result[name]:.4f}"
            + ("" if math.isnan(error) else f" ± {error:.4f}")
            + ("  upper bound" if bound and name.startswith("nll") else "")
        )
    return result
