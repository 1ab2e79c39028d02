"""Benchmarks in local files, a JSONL file for each task: LongBench and InfiniteBench, or a small made-up set in the same format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from beacon.eval.answers import answered, finish, reader
from beacon.eval.prompts import Frame, Item, encode, middle_cut
from beacon.eval.scores import best
from beacon.options import FilesConfig
from lm_core.data.synthetic import CORPORA
from lm_core.errors import InputError

Row = dict[str, Any]


def run(config: FilesConfig, benchmark: str) -> dict[str, Any]:
    """Score every row of every task; means by task and by category."""
    tasks: dict[str, dict[str, Any]] = json.loads(files("beacon.eval").joinpath(f"{benchmark}.json").read_text(encoding="utf-8"))
    rows = list(_rows(config, benchmark, tasks))
    model, tokenizer = reader(config)
    items = [_item(config, tokenizer, name, tasks[name], row) for name, row in rows]
    classes = [row.get("all_classes") or [] for _, row in rows]
    known = {item.about["row"]: own for item, own in zip(items, classes)}

    def score(item: Item, text: str) -> dict[str, float]:
        task = tasks[item.about["task"]]
        return {"score": best(task["metric"], text, item.answers, known[item.about["row"]])}

    folder, readers = answered(config, model, tokenizer, items, score)
    result: dict[str, Any] = {}
    for who in readers:
        by_task: dict[str, list[float]] = {}
        for item in folder.items.values():
            by_task.setdefault(item["task"], []).append(item[f"{who}/score"])
        means = {task: sum(own) / len(own) for task, own in sorted(by_task.items())}
        groups: dict[str, list[float]] = {}
        for task, mean in means.items():
            groups.setdefault(tasks[task]["category"], []).append(mean)
        categories = {name: sum(own) / len(own) for name, own in sorted(groups.items())}
        result[who] = {"by_task": means, "by_category": categories, "average": sum(categories.values()) / len(categories)}
    return finish(config, folder, readers, ("score",), result)


def _rows(config: FilesConfig, benchmark: str, tasks: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Row]]:
    if unknown := [name for name in config.tasks if name not in tasks]:
        raise InputError(f"tasks: {unknown[0]} is unknown; choose from {', '.join(tasks)}")
    if config.data_dir is None:
        made = list(made_up(benchmark))
        if absent := sorted(set(config.tasks) - {name for name, _ in made}):
            raise InputError(f"tasks: {absent[0]} has no made-up rows; give its file by --data-dir, or leave it out")
        yield from ((name, row) for name, row in made if not config.tasks or name in config.tasks)
        return
    wanted = config.tasks or [name for name in tasks if (config.data_dir / f"{name}.jsonl").is_file()]
    if not wanted:
        raise InputError(f"data_dir: {config.data_dir} holds none of {', '.join(f'{name}.jsonl' for name in tasks)}; name another folder")
    for name in wanted:
        path = config.data_dir / f"{name}.jsonl"
        if not path.is_file():
            raise InputError(f"tasks: {name} has no file {path}; correct --data-dir, or leave it out")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[: config.max_samples], start=1):
            try:
                row = json.loads(line)
                row["answers"] = _answers(row)
                row["context"], row["input"] = str(row["context"]), str(row.get("input") or "")
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"data_dir: {path}:{number} is no row of {benchmark} ({error!r}); it needs input, context and answers"
                ) from None
            row["number"] = f"{name}/{number}"
            yield name, row


def _answers(row: Row) -> list[str]:
    found = row["answers"] if "answers" in row else row["answer"]
    answers = [found] if isinstance(found, str) else [str(answer) for answer in found]
    # of a choice, the text of the option counts
    return [row["options"]["ABCD".index(answer)] if row.get("options") and answer in tuple("ABCD") else answer for answer in answers]


def _item(config: FilesConfig, tokenizer: Any, name: str, task: dict[str, Any], row: Row) -> Item:
    options = "\n".join(row.get("options") or [])
    text = task["prompt"].replace("{input}", row["input"]).replace("{options}", options)
    head, tail = text.split("{context}")
    frame = Frame(tokenizer, config.chat_template, head, tail)
    new = config.max_new_tokens or task["max_new_tokens"]
    room = config.max_length - frame.size - new
    if room < 1:
        raise InputError(
            f"max_length: {config.max_length} tokens do not hold the question of {name} and its answer; use at least {config.max_length - room + 1}"
        )
    context = middle_cut(encode(tokenizer, row["context"]), room)
    about = {"task": name, "row": row["number"]}
    return Item(frame.around(context), tuple(row["answers"]), about, max_new_tokens=new, first_line=task["first_line"])


def made_up(benchmark: str) -> Iterator[tuple[str, Row]]:
    """A few rows for some tasks, from `synthetic:recall` and `synthetic:markov`."""
    recall, markov = CORPORA["recall"](), list(zip(range(12), CORPORA["markov"]()))
    for number, text in zip(range(4), recall):
        given, asked = text.strip().split("\n")
        key, value = asked.split(" ")[0].split(">")
        filler = markov[number][1]
        row = {
            "context": f"{filler}{given}\n{filler}", "input": f"Which value belongs to {key}?", "answers": [value], "language": "en",
            "all_classes": None, "number": f"qa/{number}",
        }  # fmt: skip
        yield ("multifieldqa_en" if benchmark == "longbench" else "longbook_qa_eng"), row
        summary = {**row, "context": filler * 2, "input": "", "answers": [filler], "number": f"summary/{number}"}
        yield ("gov_report" if benchmark == "longbench" else "longbook_sum_eng"), summary
        if benchmark == "longbench":
            paragraphs = [f"Paragraph {at + 1}: {words}" for at, (_, words) in enumerate(markov[:6])]
            line = markov[number][1].split(". ")[1]
            yield (
                "passage_retrieval_en",
                {
                    **row,
                    "context": "\n".join(paragraphs),
                    "input": line,
                    "answers": [f"Paragraph {number + 1}"],
                    "number": f"retrieval/{number}",
                },
            )
