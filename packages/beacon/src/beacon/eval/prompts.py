"""Prompts as token ids: a long context between what is said before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from beacon.data.chat import Template, pieces

_CONTEXT = "\u241fcontext\u241f"


@dataclass(frozen=True)
class Item:
    """One question: token ids of the whole prompt, what is expected, and what the result is told apart by."""

    ids: tuple[int, ...]
    answers: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 64
    first_line: bool = False  # whether the answer ends with its line


class Frame:
    """What stands around a context of `tokenizer`'s ids: `head` before and `tail` after it, in the words of a chat template."""

    def __init__(self, tokenizer: Any, template: Template, head: str, tail: str) -> None:
        user = f"{head}{_CONTEXT}{tail}"
        if template == "no":
            before, after = user.split(_CONTEXT)
            begins = tokenizer("")["input_ids"]
            start = begins[:1] if begins and begins[0] == tokenizer.bos_token_id else []
        else:
            text = "".join(part for part, _ in pieces(template, [{"role": "user", "content": user}], tokenizer, reply=True))
            before, after = text.split(_CONTEXT)
            start = []
        self.before, self.after = [*start, *encode(tokenizer, before)], encode(tokenizer, after)

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)

    def around(self, context: Sequence[int]) -> tuple[int, ...]:
        return (*self.before, *context, *self.after)


def encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    return ids


def middle_cut(ids: Sequence[int], size: int) -> list[int]:
    """The first and the last half of `size` tokens, where there are more.

    >>> middle_cut([1, 2, 3, 4, 5], 4)
    [1, 2, 4, 5]
    """
    if len(ids) <= size:
        return list(ids)
    first = (size + 1) // 2
    return [*ids[:first], *ids[len(ids) - (size - first) :]]


def repeated(ids: Sequence[int], size: int) -> list[int]:
    """`size` tokens of a text that starts again at its end."""
    assert ids
    return (list(ids) * (-(-size // len(ids))))[:size]


def inserted(haystack: Sequence[int], needle: Sequence[int], share: float, ends: frozenset[int]) -> list[int]:
    """The needle behind `share` of the haystack, moved back to the end of a sentence (a token of `ends`) if there is one nearby."""
    at = round(share * len(haystack))
    if 0 < at < len(haystack):
        near = range(at, max(0, at - 200), -1)
        at = next((place for place in near if haystack[place - 1] in ends), at)
    return [*haystack[:at], *needle, *haystack[at:]]


def sentence_ends(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a sentence or a line."""
    return frozenset(ids[-1] for text in (".", "\n", "a.", "!", "?") if (ids := encode(tokenizer, text)))


def spread(low: int, high: int, count: int) -> list[int]:
    """`count` whole numbers at equal distances, both ends among them.

    >>> spread(0, 100, 5)
    [0, 25, 50, 75, 100]
    """
    return [round(low + (high - low) * at / max(1, count - 1)) for at in range(count)]
