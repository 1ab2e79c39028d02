from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from beacon.config import BeaconConfig
from beacon.eval import answers, files, needle, scores, short, talk
from beacon.eval.prompts import Frame, encode, inserted, sentence_ends
from beacon.options import (
    InfbenchConfig,
    LongbenchConfig,
    MultiturnConfig,
    NeedleConfig,
    PasskeyConfig,
    ShortConfig,
    TopicConfig,
)
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError
from tests.beacon.test_method import BeaconConformance

WORDS = byte_tokenizer()


class Scripted:
    """Answers prompts by a function of their text; the stock model says nothing."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=258)
    beacon = BeaconConfig(window=100, stride=50)

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer, self.disabled, self.asked = answer, False, list[str]()

    @contextmanager
    def beacon_disabled(self) -> Iterator[None]:
        self.disabled = True
        yield
        self.disabled = False

    def generate(self, ids: torch.Tensor, *, attention_mask: torch.Tensor, **options: Any) -> Any:
        rows = []
        for row, mask in zip(ids, attention_mask):
            prompt = WORDS.decode(row[mask.bool()])
            self.asked.append(prompt)
            said = "" if self.disabled else self.answer(prompt)
            rows.append([*row.tolist(), *said.encode(), 258])
        longest = max(map(len, rows))
        sequences = torch.tensor([[*row, *[256] * (longest - len(row))] for row in rows])
        return SimpleNamespace(sequences=sequences, past_key_values=SimpleNamespace(nbytes=8, layers=[]))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str]], Scripted]:
    def make(answer: Callable[[str], str]) -> Scripted:
        model = Scripted(answer)
        for module in (needle, talk, files, short):
            monkeypatch.setattr(module, "reader", lambda config: (model, WORDS))
        return model

    return make


def test_passkey_cells_are_those_of_the_script(scripted: Any, tmp_path: Path) -> None:
    def answer(prompt: str) -> str:
        found = re.search(r"The pass key is (\d+)\. Remember", prompt)
        assert found is not None
        # blind to the second half, and one digit off in long prompts
        return "" if found.start() > len(prompt) / 2 else found[1] if len(prompt) < 700 else found[1][:-1] + "x"

    model = scripted(answer)
    asked = PasskeyConfig(
        model="m",
        test_length=[500, 900],
        test_depth=[0, 100],
        baseline=["full"],
        batch_size=3,
        output_dir=tmp_path / "out",
        chat_template="no",
    )
    result = needle.run_passkey(asked)
    assert result["beacon"]["exact"] == 0.25
    assert result["beacon"]["similarity"] == pytest.approx((1 + 8 / 9) / 4)
    assert result["full"]["exact"] == 0
    assert result["beacon"]["by_length"] == {"500": 0.5, "900": 0.0}
    assert {len(prompt) for prompt in model.asked} == {500, 900}
    keys = {item["targets"][0] for item in map(json.loads, (tmp_path / "out/items.jsonl").read_text().splitlines())}
    assert len(keys) == 4
    picture = imread(tmp_path / "out/figures/passkey.png")[..., :3]
    red, green = [0.65, 0.0, 0.15], [0.0, 0.41, 0.22]  # the ends of RdYlGn
    share = [float((abs(picture - colour).max(-1) < 0.02).mean()) for colour in (red, green)]
    # seven red cells and a green one
    assert share[0] / share[1] == pytest.approx(7, rel=0.2)
    # asked again, nothing is asked again
    before = len(model.asked)
    assert needle.run_passkey(asked)["beacon"]["exact"] == 0.25
    assert len(model.asked) == before


def test_prompts_that_end_with_a_window_are_warned_about(scripted: Any, caplog: pytest.LogCaptureFixture) -> None:
    scripted(lambda prompt: "")
    for lengths, expected in (([250, 300, 301, 320], "4 of 8 prompts end with a window"), ([249, 251], "")):
        caplog.clear()
        needle.run_passkey(PasskeyConfig(model="none", test_length=lengths, test_depth=[0, 50], passkey_length=5))
        assert expected in caplog.text
        assert ("end with a window" in caplog.text) == bool(expected)


def test_a_needle_lies_at_its_depth_of_the_haystack(scripted: Any) -> None:
    model = scripted(lambda prompt: "sit in Dolores Park and eat")
    found = needle.run_needle(NeedleConfig(model="m", haystack=["builtin:python-docs"], test_length=[3000], test_depth=[0, 50, 100]))
    expected = len(scores.words("sit in Dolores Park and eat")) / len(scores.words(NeedleConfig.__dataclass_fields__["needle"].default))
    assert found["beacon"]["rouge_l"] == pytest.approx(expected)
    places = [prompt.index("The best thing") / len(prompt) for prompt in model.asked]
    assert places[0] < 0.01
    assert 0.35 < places[1] < 0.5
    assert places[2] > 0.9
    assert all(len(prompt.encode()) == 3000 for prompt in model.asked)
    copies = needle.needle_items(NeedleConfig(model="m", num_needle=3, test_length=[2000], test_depth=[10]), WORDS)
    assert WORDS.decode(next(iter(copies)).ids).count("The best thing") == 3
    with pytest.raises(ConfigError, match="min_length: 50 tokens do not hold the needle"):
        list(needle.needle_items(NeedleConfig(model="m", test_length=[50]), WORDS))


def test_the_topic_asked_for_is_the_expected_one(scripted: Any) -> None:
    def answer(prompt: str) -> str:
        which = int(
            re.search(r"What is the (\d+|first|second|third)", prompt)[1].replace("first", "1").replace("second", "2").replace("third", "3")
        )  # type: ignore[index]
        return " " + re.findall(r"discuss the topic of (.*)\.", prompt)[which - 1] + ".\nUSER: more"

    scripted(answer)
    for target in ("first", "k-th"):
        result = talk.run_topic(TopicConfig(model="m", num_topics=[2, 9], num_trials=2, target=target))  # type: ignore[arg-type]
        assert (result["beacon"]["accuracy"], result["beacon"]["f1"]) == (1, 1)
        assert result["beacon"]["by_topics"]["9"]["tokens"] > 3 * result["beacon"]["by_topics"]["2"]["tokens"]


def test_longbench_files_are_cut_in_the_middle_and_scored_by_task(scripted: Any, tmp_path: Path) -> None:
    rows = {
        "trec": {"input": "Question: x\nType:", "context": "c" * 5000, "answers": ["Food"], "all_classes": ["Food", "SeaFood"]},
        "qasper": {"input": "Who?", "context": "begin " + "m" * 5000 + " end", "answers": ["the old man", "nobody"], "all_classes": None},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**row, "length": 5000, "language": "en"}) + "\n")
    model = scripted(lambda prompt: "SeaFood" if "Type:" in prompt else "an old Man!\nQuestion: more")
    result = files.run(LongbenchConfig(model="m", data_dir=tmp_path, max_length=2000), "longbench")
    # "SeaFood" holds "Food", and is a class itself
    assert result["beacon"]["by_task"] == {"trec": 0.5, "qasper": 1.0}
    assert result["beacon"]["by_category"] == {"few-shot": 0.5, "single-document QA": 1.0}
    assert result["beacon"]["average"] == 0.75
    asked = next(prompt for prompt in model.asked if "Who?" in prompt)
    assert len(asked.encode()) == 2000 - 128
    assert "Article: begin mmm" in asked
    assert "mmm end" in asked
    (tmp_path / "trec.jsonl").write_text('{"input": "x"}\n')
    with pytest.raises(InputError, match=r"data_dir: .*trec.jsonl:1 is no row of longbench"):
        files.run(LongbenchConfig(model="m", data_dir=tmp_path), "longbench")


def test_infbench_counts_the_text_of_a_choice(scripted: Any, tmp_path: Path) -> None:
    row = {"id": 0, "context": "book", "input": "Who?", "answer": ["B"], "options": ["Ann", "Bob", "Cid", "Dan"]}
    (tmp_path / "longbook_choice_eng.jsonl").write_text(json.dumps(row) + "\n")
    model = scripted(lambda prompt: "It was Bob")
    assert files.run(InfbenchConfig(model="m", data_dir=tmp_path), "infbench")["beacon"]["score"] == 1
    assert "Ann\nBob\nCid\nDan" in model.asked[0]
    made = files.run(InfbenchConfig(model="m"), "infbench")
    assert set(made["beacon"]["by_task"]) == {"longbook_qa_eng", "longbook_sum_eng"}


@pytest.mark.parametrize(
    ("metric", "prediction", "target", "classes", "expected"),
    [
        ("qa_f1", "The cat sat", "a cat", [], 2 / 3),
        ("rouge_l", "w b c d", "w x c", [], 2 * 2 / 7),
        ("rouge_l_recall", "one x three", "one two three", [], 2 / 3),
        ("classification", "Food or Drink", "Food", ["Food", "Drink", "Law"], 0.5),
        ("classification", "Law", "Food", ["Food", "Law"], 0),
        ("retrieval", "Paragraph 3, or 4", "Paragraph 3", [], 0.5),
        ("count", "7", "7", [], 1),
        ("code_sim", "# note\nreturn x", "return x", [], 1),
        ("contains", "It is Sit in  the park", "sit in the Park", [], 1),
    ],
)
def test_scores_by_hand(metric: str, prediction: str, target: str, classes: list[str], expected: float) -> None:
    assert scores.METRICS[metric](prediction, target, classes) == pytest.approx(expected)


def test_prompts_keep_their_frame() -> None:
    frame = Frame(WORDS, "llama-3", "Read: ", " Now answer.")
    text = WORDS.decode(frame.around(encode(WORDS, "TEXT")))
    assert "user<|end_header_id|>\n\nRead: TEXT Now answer.<|eot_id|>" in text
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    hay = encode(WORDS, "One two. Three four five. Six")
    assert WORDS.decode(inserted(hay, encode(WORDS, " N"), 0.5, sentence_ends(WORDS))) == "One two. N Three four five. Six"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    BeaconConformance().run(folder, budget="2 steps", eval_every="never", beacon_window=64, max_length=150)
    return folder


def test_batches_and_turns_of_a_real_model_say_what_single_ones_say(trained: Path, tmp_path: Path) -> None:
    outs = []
    for size in (1, 3):
        asked = PasskeyConfig(
            model=str(trained), test_length=[230, 300], test_depth=[0, 60], batch_size=size, beacon_ratio=[2], baseline=["full"],
            output_dir=tmp_path / str(size), max_new_tokens=5,
        )  # fmt: skip
        needle.run_passkey(asked)
        items = [json.loads(line) for line in (tmp_path / str(size) / "items.jsonl").read_text().splitlines()]
        outs.append([(item["item"], item["beacon/prediction"], item["full/prediction"]) for item in items])
    assert outs[0] == outs[1]
    turns = MultiturnConfig(model=str(trained), length=300, turns=3, beacon_ratio=[2], baseline=["full"], output_dir=tmp_path / "turns")
    assert set(talk.run_multiturn(turns)["beacon"]["by_turn"]) == {"1", "2", "3"}


def test_short_texts_have_the_likelihoods_of_the_base(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "1+1=", "choices": ["2", "11"], "answer": 0}) + "\n")
    result = short.run(ShortConfig(model=str(trained), data_file=tmp_path / "q.jsonl", baseline=["full"]))
    assert result["beacon"]["largest_difference_from_base"] < 1e-5
    assert answers.reader(ShortConfig(model=str(trained), attn_impl="eager"))[0].attn_backend == "eager"
    model, _ = answers.reader(ShortConfig(model=str(trained), attn_impl="flash_attention_2"))
    assert model.attn_backend == "auto"
    row = torch.tensor([list(b"1+1=11")])
    with torch.no_grad():
        expected = model(row).logits[0].log_softmax(-1)
    wanted = float(expected[3, ord("1")] + expected[4, ord("1")])
    assert short.likelihood(model, list(b"1+1="), list(b"11"), "full") == pytest.approx(wanted, rel=1e-5)
    (tmp_path / "q.jsonl").write_text('{"question": "x", "choices": ["a"], "answer": 3}\n')
    with pytest.raises(InputError, match=r"data_file: .*q.jsonl:1 is no question"):
        short.run(ShortConfig(model=str(trained), data_file=tmp_path / "q.jsonl"))


def test_turns_and_short_questions_that_end_with_a_window_are_warned_about(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place, _ = talk._facts(MultiturnConfig(model=str(trained), turns=1))[0]
    asked = len(f"\nQuestion: What is the number of {place}? Answer: The number of {place} is")
    for more, warns in ((0, True), (1, False)):
        caplog.clear()
        talk.run_multiturn(MultiturnConfig(model=str(trained), length=4 * 64 - asked + more, turns=1, beacon_ratio=[2]))
        assert ("1 of 1 prompts end with a window (64 tokens" in caplog.text) == warns
        caplog.clear()
        (tmp_path / "q.jsonl").write_text(json.dumps({"question": "x" * (64 + more), "choices": ["2", "11"], "answer": 0}) + "\n")
        short.run(ShortConfig(model=str(trained), data_file=tmp_path / "q.jsonl"))
        assert ("1 of 1 prompts end with a window (64 tokens" in caplog.text) == warns
