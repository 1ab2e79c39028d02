"""Splits a command line into the options of a configuration class and what is left for click.

What click cannot read: hyphens and underscores as the same, `--x`, `--no-x` and `--x false` for one option,
`--x 2 4 8`, and all mistakes at once instead of the first.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lm_core.values import is_switch_word, without_none

_NEGATIVE_NUMBER = re.compile(r"-\.?\d.*")


class Spelling(Protocol):
    """What is needed of an option of the configuration (lm_core.config.Leaf)."""

    @property
    def path(self) -> str: ...
    @property
    def type(self) -> Any: ...
    @property
    def flag(self) -> str: ...
    @property
    def flags(self) -> tuple[str, ...]: ...


class Foreign(Protocol):
    """What is needed of an option that click reads."""

    @property
    def opts(self) -> list[str]: ...
    @property
    def secondary_opts(self) -> list[str]: ...
    @property
    def nargs(self) -> int: ...
    @property
    def is_flag(self) -> bool: ...
    @property
    def count(self) -> bool: ...


class Word(NamedTuple):
    """A flag of a guide where there is nothing to choose here: `instead` says what holds or stands for it.

    `values` are those that say what holds anyway (of a switch: "true"); where there are none, any value is read and has no effect.
    """

    instead: str
    values: tuple[str, ...] = ()


class Spelled(NamedTuple):
    """The options found, as text by path (a list for repeatable ones), the arguments left, what was wrong, and what has no effect."""

    values: Mapping[str, Any]
    rest: list[str]
    mistakes: list[str]
    notices: list[str]


def split(
    args: Sequence[str], *, options: Sequence[Any], others: Sequence[Any], positional: bool, words: Mapping[str, Word] | None = None
) -> Spelled:
    """Read the flags of `options` out of `args`.

    `options` are leaves, `others` the click options of the same command, whose flags are left in place, `words` flags of a guide
    without an option, such as `--swiglu`.
    `positional` says whether the command takes arguments; if not, a list takes all values that follow its
    flag, and a stray word is a mistake.

    >>> from lm_core.config import leaves
    >>> from lm_core.options import DataOptions
    >>> split(["--no_shuffle", "--data", "a", "b", "--packin", "x"], options=list(leaves(DataOptions)), others=[], positional=False)
    Spelled(values={'shuffle': 'false', 'data': ['a', 'b']}, rest=[], mistakes=['--packin: is not an option; did you mean --packing?'], notices=[])
    """
    return _Splitter(args, options, others, positional, words or {}).split()


class _Splitter:
    def __init__(
        self, args: Sequence[str], options: Sequence[Spelling], others: Sequence[Foreign], positional: bool, words: Mapping[str, Word]
    ) -> None:
        self.left = list(args)
        self.positional = positional
        self.values: dict[str, Any] = {}
        self.rest: list[str] = []
        self.mistakes: list[str] = []
        self.notices: list[str] = []
        self.words = {_same(flag): word for flag, word in words.items()}
        self.written: dict[str, str] = {}  # path -> the spelling it was given by
        self.known: dict[str, tuple[Spelling, bool]] = {}  # flag -> option, and whether the flag turns it off
        for option in options:
            for flag in (option.flag, *option.flags, f"--{option.path}"):
                self.known[_same(flag)] = (option, False)
                if option.type is bool and flag.startswith("--"):
                    self.known[_same(f"--no-{flag[2:]}")] = (option, True)
        self.foreign = {_same(flag): (flag, other) for other in others for flag in (*other.opts, *other.secondary_opts)}

    def split(self) -> Spelled:
        while self.left:
            word = self.left.pop(0)
            if word == "--":
                self.rest += [word, *self.left]
                break
            if word.startswith("--"):
                self._long(word)
            elif word.startswith("-") and len(word) > 1 and not _NEGATIVE_NUMBER.fullmatch(word):
                self._short(word)
            elif self.positional:
                self.rest.append(word)
            else:
                self.mistakes.append(f"{word!r}: is neither an option nor the value of one; options start with --")
        return Spelled(self.values, self.rest, self.mistakes, self.notices)

    def _long(self, word: str) -> None:
        written, sign, value = word.partition("=")
        flag = _same(written)
        if flag in self.known:
            option, off = self.known[flag]
            if not off:
                self._take(option, written, value if sign else None)
            elif sign:
                self.mistakes.append(f"{written}: takes no value; write {option.flag} {value}")
            else:
                self.values[option.path] = "false"
        elif flag in self.foreign:
            declared, other = self.foreign[flag]
            self.rest.append(declared + sign + value)
            if not sign:
                self._leave_values(other)
        elif flag in self.words:
            self._word(self.words[flag], written, value if sign else None)
        else:
            self._unknown(written, sign)

    def _word(self, word: Word, written: str, value: str | None) -> None:
        """Read a flag that has no option: a value that says something else than what holds is a mistake."""
        if value is None:
            value = "true" if not self.left or self._looks_like_flag(self.left[0]) else self.left.pop(0)
        if not word.values:
            self.notices.append(f"{written}: has no effect here; {word.instead}")
        elif value.lower() not in word.values:
            self.mistakes.append(f"{written} {value}: cannot be had; {word.instead}")

    def _short(self, word: str) -> None:
        flag, attached = word[:2], word[2:]
        if flag in self.known:
            option, _ = self.known[flag]
            if option.type is bool and attached and not is_switch_word(attached.lstrip("=")):
                self.values[option.path] = "true"  # -Fz is -F -z
                self.left.insert(0, f"-{attached}")
            else:
                self._take(option, flag, attached.removeprefix("=") if attached else None)
        elif flag in self.foreign:
            self.rest.append(word)
            if not attached:
                self._leave_values(self.foreign[flag][1])
        else:
            self._unknown(word, "")

    def _take(self, option: Spelling, written: str, value: str | None) -> None:
        """Store `value`, or else the words that follow."""
        kind = without_none(option.type)
        origin = typing.get_origin(kind)
        values = [] if value is None else [value]
        if value is None and kind is bool:
            # a word that is no switch belongs to the option only if nothing else could want it
            takes = self.left and (is_switch_word(self.left[0]) or (not self.positional and not self.left[0].startswith("-")))
            values = [self.left.pop(0)] if takes else ["true"]
        elif value is None:
            if not self.left or self._is_flag(self.left[0]):
                self.mistakes.append(f"{written}: needs a value")
                return
            values = [self.left.pop(0)]
            wanted = self._further(kind, values[0])
            while wanted > 0 and self.left and not self._looks_like_flag(self.left[0]):
                values.append(self.left.pop(0))
                wanted -= 1
        if origin in (list, dict) or (origin is tuple and Ellipsis in typing.get_args(kind)):
            self.values.setdefault(option.path, []).extend(values)
        else:
            read = ",".join(values) if origin is tuple else values[-1]
            earlier = self.written.setdefault(option.path, written)
            # a repeated flag replaces its value, as scripts expect; two spellings are two intentions
            if _same(earlier) != _same(written) and self.values[option.path] != read:
                self.mistakes.append(f"{earlier} {self.values[option.path]} and {written} {read}: are the same option; give one of them")
            self.values[option.path] = read

    def _further(self, kind: Any, first: str) -> int:
        """How many more words the option may take: lists all that follow, pairs (`--betas 0.9 0.95`) what is missing."""
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin is list or (origin is tuple and Ellipsis in args):
            return 0 if self.positional else len(self.left)
        return len(args) - 1 if origin is tuple and "," not in first else 0

    def _leave_values(self, other: Foreign) -> None:
        count = 0 if other.is_flag or other.count else other.nargs
        self.rest += self.left[:count]
        del self.left[:count]

    def _unknown(self, written: str, sign: str) -> None:
        if not sign and self.left and not self._looks_like_flag(self.left[0]):
            self.left.pop(0)  # its value, which would look like a second mistake
        known = {**{flag: option.flag for flag, (option, off) in self.known.items() if not off}, **{flag: flag for flag in self.foreign}}
        near = difflib.get_close_matches(_same(written), [flag for flag in known if flag.startswith("--")], 1)
        self.mistakes.append(f"{written}: is not an option; {f'did you mean {known[near[0]]}?' if near else '--help lists them all'}")

    def _is_flag(self, word: str) -> bool:
        flag = _same(word.partition("=")[0])
        return word == "--" or flag in self.known or flag in self.foreign

    def _looks_like_flag(self, word: str) -> bool:
        return word.startswith("-") and len(word) > 1 and not _NEGATIVE_NUMBER.fullmatch(word)


def _same(flag: str) -> str:
    """One spelling for hyphens and underscores; short flags as they are."""
    return "--" + flag[2:].replace("_", "-") if flag.startswith("--") else flag
