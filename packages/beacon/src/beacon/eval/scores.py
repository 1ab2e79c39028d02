"""Scores of an answer against what was expected, each between 0 and 1. Definitions of LongBench (arXiv 2308.14508) unless said otherwise."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

Metric = Callable[[str, str, Sequence[str]], float]  # prediction, target, all classes


def words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles; Chinese text by character.

    >>> words("The cat, a dog!")
    ['cat', 'dog']
    """
    text = "".join(character for character in text.lower() if unicodedata.category(character)[0] not in "PS")
    text = re.sub(r"([\u4e00-\u9fff])", r" \1 ", text)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def f1(prediction: Sequence[str], target: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the words both have.

    >>> f1(["a", "b"], ["b", "c"])
    0.5
    """
    common = sum((Counter(prediction) & Counter(target)).values())
    return 2 * common / (len(prediction) + len(target)) if common else 0.0


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """
    >>> common_subsequence("abcd", "axcd")
    3
    """
    row = [0] * (len(other) + 1)
    for item in one:
        before = 0
        for at, candidate in enumerate(other, start=1):
            before, row[at] = row[at], before + 1 if item == candidate else max(row[at], row[at - 1])
    return row[-1]


def rouge_l_recall(prediction: str, target: str, classes: Sequence[str] = ()) -> float:
    """Share of the target's words that the prediction has in their order (Lin 2004)."""
    expected = words(target)
    return common_subsequence(words(prediction), expected) / len(expected) if expected else 0.0


def rouge_l(prediction: str, target: str, classes: Sequence[str] = ()) -> float:
    """F measure of the longest common subsequence of words."""
    found, expected = words(prediction), words(target)
    common = common_subsequence(found, expected)
    return 2 * common / (len(found) + len(expected)) if common else 0.0


def qa_f1(prediction: str, target: str, classes: Sequence[str] = ()) -> float:
    return f1(words(prediction), words(target))


def classification(prediction: str, target: str, classes: Sequence[str] = ()) -> float:
    """1 over the number of classes that the prediction names, if the right one is among them."""
    named = [name for name in classes if name in prediction]
    named = [name for name in named if not (name in target and name != target)]
    return 1 / len(named) if target in named else 0.0


def retrieval(prediction: str, target: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the target's."""
    return _share(prediction, re.findall(r"\d+", target)[:1])


def count(prediction: str, target: str, classes: Sequence[str] = ()) -> float:
    return _share(prediction, [target.strip()])


def _share(prediction: str, expected: Sequence[str]) -> float:
    numbers = re.findall(r"\d+", prediction)
    return sum(number in expected for number in numbers) / len(numbers) if numbers else 0.0


def code_sim(prediction: str, target: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first line that is code."""
    lines = [line for line in prediction.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//"))]
    return similarity(lines[0] if lines else "", target)


def similarity(prediction: str, target: str, classes: Sequence[str] = ()) -> float:
    """Share of matching characters (difflib)."""
    return SequenceMatcher(None, prediction, target, autojunk=False).ratio()


def contains(prediction: str, target: str, classes: Sequence[str] = ()) -> float:
    """Whether the prediction holds the target, whatever the case and the blanks."""
    return float(" ".join(target.lower().split()) in " ".join(prediction.lower().split()))


METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1,
    "rouge_l": rouge_l,
    "rouge_l_recall": rouge_l_recall,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code_sim": code_sim,
    "similarity": similarity,
    "contains": contains,
}


def best(metric: str, prediction: str, targets: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The score against the target that fits best."""
    return max((METRICS[metric](prediction, target, classes) for target in targets), default=0.0)
