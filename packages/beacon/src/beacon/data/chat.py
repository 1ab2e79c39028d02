"""Conversations as text with the parts to learn from marked, and as tokens whose labels come from character offsets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from lm_core.data.shards import Document, key_of
from lm_core.data.sources import Row
from lm_core.errors import ConfigError, InputError, UserError
from lm_core.method import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = Sequence[Mapping[str, str]]
Piece = tuple[str, bool]  # text, and whether it is learned
Template = Literal["hf", "llama-2", "llama-3", "mistral", "qwen", "no"]

# what ends an assistant's turn
END_OF_TURN = {"llama-2": "</s>", "mistral": "</s>", "llama-3": "<|eot_id|>", "qwen": "<|im_end|>"}


def conversation(fields: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The turns of a row, without a leading one that is neither user's nor system's.

    Raises InputError, naming the row, for anything but roles that take turns.
    """
    turns = fields.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise InputError(f'data: {where}: conversations is no list of turns; write [{{"role": "user", "content": "..."}}, ...]')
    found = []
    for number, turn in enumerate(turns):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if role not in ("user", "assistant", "system") or not isinstance(content, str):
            raise InputError(
                f"data: {where}: turn {number} needs a role (user, assistant or system) and a text as content; correct the row"
            )
        found.append({"role": role, "content": content})
    if found[0]["role"] == "assistant":
        found = found[1:]
    for number, (one, other) in enumerate(pairwise(found)):
        if one["role"] == other["role"]:
            raise InputError(f"data: {where}: two turns of the {one['role']} follow one another (turn {number}); join them")
        if other["role"] == "system":
            raise InputError(f"data: {where}: a system turn follows other turns (turn {number + 1}); put it first")
    return found


def pieces(template: Template, turns: Turns, tokenizer: PreTrainedTokenizerBase, *, reply: bool = False) -> list[Piece]:
    """The text of a conversation in parts; those of the assistant, each with its end of turn, are learned.

    With `reply` the text ends where the assistant's next turn begins.
    """
    if template == "hf":
        return _by_tokenizer(turns, tokenizer, reply)
    return _TEMPLATES[template](turns, tokenizer, reply)


def _llama2(turns: Turns, tokenizer: Any, reply: bool) -> list[Piece]:
    out: list[Piece] = []
    for system, user, answer in _exchanges(turns):
        before = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
        out.append((f"<s>[INST] {before}{user} [/INST]", False))
        if answer is not None:
            out += [(" ", False), (f"{answer} </s>", True)]
    return out


def _mistral(turns: Turns, tokenizer: Any, reply: bool) -> list[Piece]:
    out: list[Piece] = [("<s>", False)]
    for system, user, answer in _exchanges(turns):
        before = f"{system}\n\n" if system else ""
        out.append((f"[INST] {before}{user} [/INST]", False))
        if answer is not None:
            out += [(" ", False), (f"{answer}</s>", True)]
    return out


def _llama3(turns: Turns, tokenizer: Any, reply: bool) -> list[Piece]:
    out: list[Piece] = [("<|begin_of_text|>", False)]
    for turn in turns:
        out.append((f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n", False))
        out.append((f"{turn['content']}<|eot_id|>", turn["role"] == "assistant"))
    return [*out, ("<|start_header_id|>assistant<|end_header_id|>\n\n", False)] if reply else out


def _qwen(turns: Turns, tokenizer: Any, reply: bool) -> list[Piece]:
    out: list[Piece] = []
    for turn in turns:
        out.append((f"<|im_start|>{turn['role']}\n", False))
        out += [(f"{turn['content']}<|im_end|>", turn["role"] == "assistant"), ("\n", False)]
    return [*out, ("<|im_start|>assistant\n", False)] if reply else out


def _none(turns: Turns, tokenizer: Any, reply: bool) -> list[Piece]:
    exchanges = _exchanges(turns)
    if len(exchanges) > 1:
        raise InputError("chat_template: no joins one question and one answer, this conversation has more turns; use another template")
    ((system, user, answer),) = exchanges
    out: list[Piece] = [(f"{system} {user} " if system else f"{user} ", False)]
    return out if answer is None else [*out, (answer + (tokenizer.eos_token or ""), True)]


_TEMPLATES: dict[str, Callable[[Turns, Any, bool], list[Piece]]] = {
    "llama-2": _llama2,
    "llama-3": _llama3,
    "mistral": _mistral,
    "qwen": _qwen,
    "no": _none,
}


def _exchanges(turns: Turns) -> list[tuple[str, str, str | None]]:
    """System text, question and answer of each exchange."""
    out, system = list[tuple[str, str, str | None]](), ""
    for turn in turns:
        if turn["role"] == "system":
            system = turn["content"]
        elif turn["role"] == "user":
            out.append((system, turn["content"], None))
            system = ""
        elif out:
            out[-1] = (*out[-1][:2], turn["content"])
    return out


def _by_tokenizer(turns: Turns, tokenizer: Any, reply: bool) -> list[Piece]:
    """The tokenizer's own template: what an assistant's turn adds to the text before it is learned."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("chat_template: hf, but this tokenizer has no template; choose llama-2, llama-3, mistral, qwen or no")

    def text(upto: int, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(list(turns[:upto]), tokenize=False, add_generation_prompt=prompt)) if upto else ""

    out, at = list[Piece](), ""
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = text(number, True), text(number + 1, False)
        if not before.startswith(at) or not after.startswith(before):
            raise ConfigError(
                "chat_template: hf, but this template does not write a conversation turn by turn, so nobody knows which tokens are the "
                "assistant's; choose llama-2, llama-3, mistral, qwen or no"
            )
        learned = after[len(before) :].rstrip("\n")
        out += [(before[len(at) :], False), (learned, True), (after[len(before) + len(learned) :], False)]
        at = after
    whole = text(len(turns), reply)
    return [*out, (whole[len(at) :], False)] if whole.startswith(at) else out


def tokens(parts: Sequence[Piece], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids and labels: a token is learned if any of its characters is.

    Raises ConfigError for tokenizers that cannot say which characters a token stands for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("tokenizer: chat data needs one that knows the place of its tokens in the text; use a fast tokenizer")
    spans, at = [], 0
    for part, learned in parts:
        if learned and part:
            spans.append((at, at + len(part)))
        at += len(part)
    found = tokenizer("".join(part for part, _ in parts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = []
    for token, (first, last) in zip(found["input_ids"], found["offset_mapping"]):
        while spans and spans[0][1] <= first:
            spans.pop(0)
        labels.append(token if spans and last > spans[0][0] and last > first else IGNORE)
    return found["input_ids"], labels


class ChatEncoder:
    """Rows of conversations to documents with labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        self._tokenizer, self._template = tokenizer, template

    def __call__(self, rows: Sequence[Row]) -> list[Document | None]:
        return [self._document(row) for row in rows]

    def _document(self, row: Row) -> Document | None:
        turns = conversation(row.fields, row.where)
        try:
            ids, labels = tokens(pieces(self._template, turns, self._tokenizer), self._tokenizer)
        except UserError as error:
            raise InputError(f"data: {row.where}: {error}") from None
        # a row is held out by what it says, whatever the template makes of it
        return Document(ids, labels, key_of(str(row.fields["conversations"]))) if ids else None
