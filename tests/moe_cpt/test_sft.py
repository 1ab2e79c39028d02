from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lm_core.config import build
from lm_core.data.sources import Row
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError
from lm_core.method import IGNORE
from moe_cpt.config import SFTConfig
from moe_cpt.sft import SYSTEM, conversation_of, conversations, encoded
from tests.moe_cpt.small import mixture_folder
from tests.moe_cpt.test_commands import call

TURNS = [
    {"from": "human", "value": "Hi?"},
    {"from": "gpt", "value": " Grüße 🙂 "},
    {"from": "human", "value": "Sure? USER: x"},
    {"from": "gpt", "value": "Yes."},
]


def lines(path: Path, count: int = 40) -> Path:
    rows = [{"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"It is {n}."}]} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(**options: Any) -> SFTConfig:
    return build(SFTConfig, {"model": "x", "max_length": 300, **options})


def test_only_what_the_assistant_says_is_learned() -> None:
    tokenizer = byte_tokenizer()
    made = conversation_of(Row("f", 1, {"conversations": TURNS, "system_prompt": "S."}), "<eos>")
    assert made.text == "S. USER: Hi? ASSISTANT: Grüße 🙂<eos>USER: Sure? USER: x ASSISTANT: Yes.<eos>"
    row = encoded(made, tokenizer, 500)
    learned = [token for token, label in zip(row["input_ids"].tolist(), row["labels"].tolist()) if label != IGNORE]
    assert learned == [label for label in row["labels"].tolist() if label != IGNORE]
    assert bytes(token for token in learned if token < 256).decode() == " Grüße 🙂 Yes."
    assert [at for at, token in enumerate(learned) if token == 258] == [len(" Grüße 🙂".encode()), len(learned) - 1]


def test_a_title_is_the_question_to_its_text() -> None:
    made = conversation_of(Row("f", 1, {"title": "if", "text": "The if statement"}), "</s>")
    assert made.text == f"{SYSTEM} USER: if ASSISTANT: The if statement</s>"


def test_conversations_are_held_out_once_and_cut_ones_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = lines(tmp_path / "chat.jsonl")
    data = conversations(config(data=[str(path)], hold_out=0.2), byte_tokenizer())
    train, valid = data.train["chat"], data.valid["chat"]
    assert len(train) + len(valid) == 40
    assert 2 <= len(valid) <= 16
    assert not {row["input_ids"].tobytes() for row in map(train.__getitem__, range(len(train)))} & {
        valid[at]["input_ids"].tobytes() for at in range(len(valid))
    }
    # the prompt alone is longer
    with pytest.raises(InputError, match="chat has no conversation with an answer within 40 tokens"):
        conversations(config(data=[str(path)], max_length=40), byte_tokenizer())
    assert "are cut at 40 tokens" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "f:3 has no conversations"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "f:3: a turn is from 'bot'"),
        ({"conversations": [{"from": "gpt"}]}, "f:3: a turn is from 'gpt'; each needs"),
    ],
)
def test_rows_of_another_shape_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        conversation_of(Row("f", 3, row), "</s>")


def test_length_of_a_run_is_passes_over_the_data_by_default() -> None:
    assert config(data=["x"]).limits().limits == {"epochs": 2}
    assert config(data=["x"], max_steps=7).limits().limits == {"steps": 7}
    with pytest.raises(ConfigError, match="num_tokens: 100 is for train"):
        config(data=["x"], num_tokens=100)


@pytest.mark.slow
def test_tuning_lowers_the_loss_of_answers(tmp_path: Path) -> None:
    model = mixture_folder(tmp_path, num_selects=2)
    config_file = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config_file | {"max_position_embeddings": 256}))
    words = ("sft", "--model_name_or_path", model, "--dataset_dir_or_path", lines(tmp_path / "chat.jsonl"), "--model_max_length", 200)
    call(*words, "--lr", 1e-2, "--precision", "fp32", "--num_train_epochs", 3, "--freeze_gate", "--no-tensorboard", "-o", tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["eval/chat/loss"] for record in records if "eval/chat/loss" in record]
    assert held_out[-1] < held_out[0] - 0.5
