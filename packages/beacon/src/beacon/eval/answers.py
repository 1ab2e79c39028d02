"""Answers to prompts by the model through its memory, or by its base with full attention; batched, over any number of processes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from beacon.attach import set_beacon
from beacon.data.chat import END_OF_TURN
from beacon.eval.folder import EvalFolder
from beacon.eval.prompts import Item, encode
from beacon.io import load_beacon, model_folder, tokenizer_name
from beacon.options import TaskOptions, settings
from lm_core import dist
from lm_core.data.vocab import byte_tokenizer
from lm_core.models import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from beacon.config import BeaconConfig

log = logging.getLogger(__name__)

Scorer = Callable[[Item, str], dict[str, float]]
Summary = Callable[[Sequence[Mapping[str, Any]], str], dict[str, Any]]


def reader(config: TaskOptions) -> tuple[Any, Any]:
    """The model with the asked settings, and its tokenizer."""
    model = load_beacon(config.model).to(dist.init(config.device))
    set_beacon(model, settings(config, model.beacon))
    name = tokenizer_name(config.model)
    tokenizer = byte_tokenizer() if name == "bytes" else load_tokenizer(name)
    return model, tokenizer


def answered(config: TaskOptions, model: Any, tokenizer: Any, items: Iterable[Item], score: Scorer) -> tuple[EvalFolder, list[str]]:
    """Every item answered by the beacon model and the asked baselines; the folder holds prediction, targets and scores of each."""
    # prompts that cannot be made say so before a folder is
    items = list(items)
    folder = EvalFolder(config.output_dir, config, config.overwrite)
    readers = ["beacon", *config.baseline]
    _check_end(config, model, tokenizer)
    check_windows(model, [len(item.ids) for item in items])
    todo = [(number, item) for number, item in enumerate(items) if number not in folder.items]
    rank, world = dist.rank(), dist.world()
    size = config.batch_size * world
    for first in range(0, len(todo), size):
        mine = todo[first : first + size][rank::world]
        found = _batch(config, model, tokenizer, mine, readers, score) if mine else []
        for item in sorted((item for part in dist.gather_objects(found) for item in part), key=lambda item: item["item"]):
            folder.add(item)
        if rank == 0 and first // size % 10 == 0:
            log.info("%d of %d", min(first + size, len(todo)), len(todo))
    return folder, readers


def _batch(
    config: TaskOptions, model: Any, tokenizer: Any, mine: list[tuple[int, Item]], readers: list[str], score: Scorer
) -> list[dict[str, Any]]:
    found = [{"item": number, "tokens": len(item.ids), "targets": list(item.answers), **item.about} for number, item in mine]
    for who in readers:
        began = time.perf_counter()
        texts, kv = generated(config, model, tokenizer, [item for _, item in mine], who)
        seconds = (time.perf_counter() - began) / len(mine)
        for out, (_, item), text in zip(found, mine, texts):
            out |= {f"{who}/prediction": text, f"{who}/seconds": seconds, f"{who}/kv_bytes": kv // len(mine)}
            out |= {f"{who}/{name}": value for name, value in score(item, text).items()}
    return found


@torch.no_grad()
def generated(config: TaskOptions, model: Any, tokenizer: Any, items: Sequence[Item], who: str) -> tuple[list[str], int]:
    """What follows each prompt, and the bytes of keys and values at the end."""
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    width = max(len(item.ids) for item in items)
    ids = torch.full((len(items), width), pad)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, width - len(item.ids) :] = torch.tensor(item.ids)
        mask[row, width - len(item.ids) :] = 1
    new = config.max_new_tokens or max(item.max_new_tokens for item in items)
    options: dict[str, Any] = {"max_new_tokens": new, "pad_token_id": pad, "do_sample": config.do_sample}
    if config.do_sample:
        torch.manual_seed(config.seed)
        options |= {"temperature": config.temperature, "top_p": config.top_p}
    if (ends := _ends(model, tokenizer, all(item.first_line for item in items))) is not None:
        options["eos_token_id"] = ends
    options |= {"attention_mask": mask.to(model.device), "return_dict_in_generate": True}
    if who == "full":
        with model.beacon_disabled():
            out = model.generate(ids.to(model.device), **options)
        cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    else:
        ratios = list(config.beacon_ratio) if len(config.beacon_ratio) == 1 else None
        out = model.generate(ids.to(model.device), ratios=ratios, seed=config.seed, **options)
        cache = out.past_key_values.nbytes
    texts = []
    for row, item in zip(out.sequences[:, width:], items):
        text = tokenizer.decode(row, skip_special_tokens=True).strip()
        texts.append(text.split("\n")[0] if item.first_line else text)
    return texts, cache


def _ends(model: Any, tokenizer: Any, line: bool) -> list[int] | None:
    """Every end token of the config; the newline, too, where an answer is one line."""
    known = model.generation_config.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or [])
    if line and len(newline := encode(tokenizer, "\n")) == 1:
        ends += newline
    return ends or None


def _check_end(config: TaskOptions, model: Any, tokenizer: Any) -> None:
    """Warn where the model does not stop at the end of its own turn."""
    if (ending := END_OF_TURN.get(config.chat_template)) is None:
        return
    known = model.generation_config.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or [])
    if len(ends) == 1 and tokenizer.convert_tokens_to_ids(ending) not in ends:
        log.warning(
            "%s: generation stops at %s only, not at %s, which ends a turn of %s; correct eos_token_id in generation_config.json",
            model_folder(config.model), ends, ending, config.chat_template,
        )  # fmt: skip


def check_windows(model: Any, lengths: Sequence[int]) -> None:
    """Warn of prompts that end where a window does: what is written behind them reads even the question through memory."""
    beacon: BeaconConfig = model.beacon
    closed = sum(length >= beacon.window and (length - beacon.window) % beacon.stride == 0 for length in lengths)
    if closed:
        log.warning(
            "%d of %d prompts end with a window (%d tokens, stride %d), so their question is compacted before it is answered; other lengths leave it raw",
            closed, len(lengths), beacon.window, beacon.stride,
        )  # fmt: skip


def means(items: Sequence[Mapping[str, Any]], who: str, names: Sequence[str]) -> dict[str, float]:
    """Means over items of what one reader scored."""
    return {name: sum(item[f"{who}/{name}"] for item in items) / len(items) for name in [*names, "seconds"]}


def finish(config: TaskOptions, folder: EvalFolder, readers: Sequence[str], names: Sequence[str], result: dict[str, Any]) -> dict[str, Any]:
    """Write the result and print it, one line for each reader."""
    items = [folder.items[number] for number in sorted(folder.items)]
    whole = {"items": len(items), **{who: {**means(items, who, names), **result.get(who, {})} for who in readers}}
    if dist.rank() == 0:
        columns = ["item", "tokens", *(key for key in items[0] if key not in ("item", "tokens", "targets", "ids"))]
        folder.finish(json.loads(json.dumps(whole)), columns)
        for who in readers:
            print(f"{who}: " + "  ".join(f"{name} {value:.3f}" for name, value in means(items, who, names).items()))
    return whole
