"""Rows of every kind: their tokens, and which of them are taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lm_core.config import build
from lm_core.data.loader import eval_batches
from lm_core.data.sources import Row
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError
from rwkv_distill import binidx
from rwkv_distill.config import TrainConfig, settle
from rwkv_distill.method import student_data
from rwkv_distill.rows import ABOUT, RowEncoder, check_messages, segments

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
EOS = 258


def chatty() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def encoded(fields: dict[str, Any], **options: Any) -> Any:
    tokenizer = options.pop("tokenizer", None) or chatty()
    return RowEncoder(tokenizer, "text", **options)([Row("f", 1, fields)])[0]


def taught(document: Any) -> str:
    return bytes(label for label in document.labels if 0 <= label < 256).decode()


def data_of(**options: Any) -> Any:
    config = settle(
        build(TrainConfig, {"model": "tiny", "tokenizer": "bytes", "device": "cpu", "max_length": 64, "hold_out": 0.0, **options})
    )
    return student_data(config, chatty())


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a?"}, {"role": "assistant", "content": "yes"},
                      {"role": "user", "content": "b?"}, {"role": "assistant", "content": "no"}]},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a?"}, {"from": "gpt", "value": "yes"},
                           {"from": "human", "value": "b?"}, {"from": "gpt", "value": "no"}]},
    ],
    ids=["messages", "conversations"],
)  # fmt: skip
def test_only_what_the_assistant_says_is_taught(fields: dict[str, Any]) -> None:
    document = encoded(fields)
    assert bytes(document.ids).decode() == "<system>s</><user>a?</><assistant>yes</><user>b?</><assistant>no</>"
    assert taught(document) == "yes</>no</>"
    assert all(label in (-100, token) for token, label in zip(document.ids, document.labels, strict=True))


def test_a_completion_is_taught_and_its_prompt_is_not() -> None:
    document = encoded({"prompt": "1+1=", "completion": "2"})
    assert (list(document.ids), list(document.labels)) == ([*b"1+1=2", EOS], [-100] * 4 + [ord("2"), EOS])


def test_text_is_taught_throughout_and_empty_rows_are_none() -> None:
    assert list(encoded({"text": "ab"}).labels) == [*b"ab", EOS]
    for empty in ({"text": ""}, {"messages": []}, {"prompt": "a", "completion": ""}, {"input_ids": []}):
        assert encoded(empty) is None


def test_padding_of_ready_rows_is_left_out_and_shifted_labels_move_back() -> None:
    fields = {"input_ids": [0, 5, 6, 7], "attention_mask": [0, 1, 1, 1], "labels": [5, 6, -100, -100]}
    assert list(encoded(fields, shifted=True).labels) == [5, 6, -100]
    assert list(encoded({"input_ids": [5, 6]}).labels) == [5, 6]


def test_packed_rows_are_taken_apart() -> None:
    row = Row("f", 3, {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, -100], "segment_ids": [0, 0, 1, 1], "other": "x"})
    assert [part.fields for part in segments(iter([row]))] == [
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"input_ids": [3, 4], "labels": [3, -100]},
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"story": "x"}, "f:1 has no field that is known .found: story"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "f:1: the role 'tool' is unknown; use system"),
        ({"messages": [{"role": "user"}]}, "f:1: a turn is no pair of role and content"),
        ({"input_ids": [1, 2], "labels": [1]}, "f:1: 1 labels for 2 input_ids"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "f:1: attention_mask has 1 entries"),
        ({"prompt": "x", "completion": 3}, "f:1: prompt and completion are not both texts"),
    ],
)
def test_rows_that_cannot_be_used_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        encoded(fields)


def test_chats_need_a_template_that_keeps_earlier_turns() -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}
    with pytest.raises(InputError, match="no chat template"):
        encoded(chat, tokenizer=byte_tokenizer())
    forgetful = chatty()
    forgetful.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(InputError, match="rewrites earlier turns"):
        encoded(chat, tokenizer=forgetful)
    assert check_messages({"role": "user", "content": "a"}, "f") == [{"role": "user", "content": "a"}]


def test_mixed_rows_of_a_file_become_samples_with_their_labels(tmp_path: Path) -> None:
    rows = [{"text": "plain"}, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A"}]}, {"text": ""}]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = data_of(data=[f"{tmp_path}/mixed.jsonl"], batching="pad", padding_side="left")
    (batch,) = eval_batches(data.train["mixed"], micro_batch=2)
    short = int((batch["attention_mask"] == 0).sum())
    assert batch["attention_mask"][0].tolist() == [0] * short + [1] * 6
    assert batch["input_ids"][0, short:].tolist() == [*b"plain", EOS]
    assert bytes(batch["labels"][1][batch["labels"][1] >= 0].tolist()) == b"A</>"


def test_token_ids_come_from_saved_datasets_and_pairs(tmp_path: Path) -> None:
    import datasets

    documents = [[5, 6, 7, 8], [9, 10, 11]]
    datasets.Dataset.from_dict({"input_ids": documents, "labels": [[6, 7, 8, -100], [10, 11, -100]]}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / ABOUT).write_text('{"labels_shifted": true}')
    writer = binidx.BinidxWriter(tmp_path / "pair", 512)
    for ids in documents:
        writer.add(ids)
    writer.close()
    assert [part.tolist() for part in binidx.read(tmp_path / "pair")] == documents
    assert (tmp_path / "pair.bin").read_bytes() == np.array([5, 6, 7, 8, 9, 10, 11], dtype="<u2").tobytes()
    for name in ("saved", "pair.bin", "pair"):
        data = data_of(preprocessed_data=[str(tmp_path / name)])
        (batch,) = eval_batches(next(iter(data.train.values())), micro_batch=2)
        assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 7, 8], [9, 10, 11, 256]])), name
        # the first label of a row is none
        assert batch["labels"].tolist() == [[-100, 6, 7, 8], [-100, 10, 11, -100]], name


def test_wrong_preprocessed_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "x"}')
    with pytest.raises(InputError, match="has no input_ids"):
        data_of(preprocessed_data=[f"{tmp_path}/text.jsonl"])
    with pytest.raises(ConfigError, match="give -p or -r, not both"):
        data_of(preprocessed_data=["a"], data=["b"])
    (tmp_path / "x.idx").write_bytes(b"nothing")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"x.idx is no index of token ids"):
        data_of(preprocessed_data=[f"{tmp_path}/x"])


def test_one_string_may_list_several_sources() -> None:
    data = data_of(data=["synthetic:markov[20] synthetic:copy[20]"])
    assert list(data.train) == ["markov", "copy"]
