from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from beacon.cli import cli
from beacon.config import BeaconConfig, windows
from beacon.data import training_data
from beacon.data.arguments import located
from beacon.data.blocks import Blocks
from beacon.data.chat import conversation, pieces, tokens
from beacon.data.pretrain import blocks_of, mixture
from beacon.options import TrainConfig
from beacon.sampler import by_windows, grouped
from lm_core.config import build
from lm_core.data.loader import Loader
from lm_core.data.sources import parse, resolve
from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError, UserError

WORDS = byte_tokenizer()
TURNS = [
    {"role": "user", "content": "Où est-ce?"},
    {"role": "assistant", "content": "Là-bas, s.v.p."},
    {"role": "user", "content": "Why"},
    {"role": "assistant", "content": "Because."},
]


def learned(template: Any, turns: list[dict[str, str]], tokenizer: Any = WORDS) -> tuple[str, list[str]]:
    """The whole text, and the stretches of it that are learned, both decoded from tokens."""
    ids, labels = tokens(pieces(template, turns, tokenizer), tokenizer)
    marks = "".join("x" if label != -100 else "." for label in labels)
    assert [label for label in labels if label != -100] == [token for token, label in zip(ids, labels) if label != -100]
    return tokenizer.decode(ids), [tokenizer.decode(ids[match.start() : match.end()]) for match in re.finditer("x+", marks)]


@pytest.mark.parametrize(
    ("template", "text", "answers"),
    [
        (
            "llama-2",
            "<s>[INST] Où est-ce? [/INST] Là-bas, s.v.p. </s><s>[INST] Why [/INST] Because. </s>",
            ["Là-bas, s.v.p. </s>", "Because. </s>"],
        ),
        (
            "mistral",
            "<s>[INST] Où est-ce? [/INST] Là-bas, s.v.p.</s>[INST] Why [/INST] Because.</s>",
            ["Là-bas, s.v.p.</s>", "Because.</s>"],
        ),
        (
            "llama-3",
            (
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nOù est-ce?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
                "Là-bas, s.v.p.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
                "Because.<|eot_id|>"
            ),
            ["Là-bas, s.v.p.<|eot_id|>", "Because.<|eot_id|>"],
        ),
        (
            "qwen",
            (
                "<|im_start|>user\nOù est-ce?<|im_end|>\n<|im_start|>assistant\nLà-bas, s.v.p.<|im_end|>\n"
                "<|im_start|>user\nWhy<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
            ),
            ["Là-bas, s.v.p.<|im_end|>", "Because.<|im_end|>"],
        ),
    ],
)
def test_labels_decode_to_the_assistants_words(template: str, text: str, answers: list[str]) -> None:
    assert learned(template, TURNS) == (text, answers)
    # the text up to an answer is what a model is asked with
    asked = "".join(part for part, _ in pieces(template, TURNS[:3], WORDS, reply=True))  # type: ignore[arg-type]
    assert text.startswith(asked)
    assert text[len(asked) :].lstrip(" ").startswith("Because.")


def test_one_exchange_without_a_template_and_the_tokenizers_own() -> None:
    assert learned("no", TURNS[:2]) == ("Où est-ce? Là-bas, s.v.p.<eos>", ["Là-bas, s.v.p.<eos>"])
    with pytest.raises(InputError, match="chat_template: no joins one question"):
        learned("no", TURNS)
    own = byte_tokenizer()
    with pytest.raises(ConfigError, match="this tokenizer has no template"):
        learned("hf", TURNS, own)
    own.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text = "<user>Où est-ce?<eos>\n<assistant>Là-bas, s.v.p.<eos>\n<user>Why<eos>\n<assistant>Because.<eos>\n"
    assert learned("hf", TURNS, own) == (text, ["Là-bas, s.v.p.<eos>", "Because.<eos>"])
    own.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="does not write a conversation turn by turn"):
        learned("hf", TURNS, own)


def test_a_token_across_the_border_of_an_answer_is_learned() -> None:
    from lm_core.data.vocab import train_bpe

    merged = train_bpe(["yes no yes no " * 40], 263)
    ids, labels = tokens([("q ", False), ("yes", True), (" no yes", False)], merged)
    shown = [merged.decode([token]) for token, label in zip(ids, labels) if label != -100]
    assert "".join(shown).strip() == "yes"


def test_turns_are_read_and_mistakes_are_named() -> None:
    lead = {"role": "assistant", "content": "Hello"}
    assert conversation({"conversations": [lead, *TURNS]}, "f:1") == TURNS
    system = {"role": "system", "content": "Be brief."}
    assert conversation({"conversations": [system, *TURNS]}, "f:1")[0] == system
    assert learned("llama-2", [system, *TURNS[:2]])[0].startswith("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nOù")
    for wrong, message in (
        ([TURNS[0], TURNS[0]], "two turns of the user follow one another"),
        ([*TURNS[:2], system], "a system turn follows"),
        ([{"role": "tool", "content": "x"}], "turn 0 needs a role"),
        ("text", "is no list of turns"),
    ):
        with pytest.raises(InputError, match=f"data: f:7: .*{message}"):
            conversation({"conversations": wrong}, "f:7")


def test_prefixes_and_patterns_find_files_under_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / "gpt").mkdir(exist_ok=True)
        (tmp_path / "gpt" / name).write_text("[]")
    root = str(tmp_path / "gpt")
    assert located(["activation-beacon:gpt/a.json[200000]", "long-llm:gpt/*.json[5]@0.5"], tmp_path) == [
        f"{root}/a.json[200000]", f"{root}/a.json[5]@0.5", f"{root}/b.json[5]@0.5",
    ]  # fmt: skip
    monkeypatch.setenv("BEACON_DATA_ROOT", str(tmp_path))
    assert located(["data:gpt/b.json", "builtin:stdlib"], None) == [f"{root}/b.json", "builtin:stdlib"]
    with pytest.raises(InputError, match=rf"train_data: data:c.json does not exist \(looked for {tmp_path}/c.json\)"):
        located(["data:c.json"], None)
    with pytest.raises(InputError, match=r"matches nothing"):
        located(["data:*.txt"], None)


# --- packing ---


def pack(folder: Path, *more: str, code: int = 0) -> str:
    words = ["pretrain-data", "--model", "llama_tiny", "--tokenizer", "bytes", "--output-dir", str(folder), *more]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    for name, size in (("wiki", 40), ("code", 70)):
        rows = [json.dumps({"text": f"{name} {number} " * (number % 5 + 1)}) for number in range(size)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "mix.json").write_text(json.dumps({"wiki": 25, "code": 75}))
    pack(folder / "out", "--train-data", str(folder), "--mixture", str(folder / "mix.json"), "--num-token", "32:1k", "48:500")
    return folder


def test_blocks_replay_the_documents(packed: Path) -> None:
    rows = Blocks(packed / "out", len(WORDS), 256)
    assert len(rows) == sum(blocks_of(count, share, size) for share in (25, 75) for size, count in ((32, 1000), (48, 500)))
    streams = {}
    for name in ("code", "wiki"):
        texts = [row.fields["text"] for row in resolve(parse(str(packed / f"{name}.jsonl"))).rows()]
        streams[name] = [[257, *text.encode(), 258] for text in texts]
    at, taken = "code", 0
    for k in range(len(rows)):
        row = rows[k]
        ids, documents = row["input_ids"], row["document_ids"]
        assert documents[0] == 0
        # a new document begins at, and only at, a begin token
        np.testing.assert_array_equal(np.diff(documents), (ids[1:] == 257).astype(int))
        flat = np.concatenate(streams[at])
        if not np.array_equal(flat[taken : taken + len(ids)], ids):
            at, taken, flat = "wiki", 0, np.concatenate(streams["wiki"])
        np.testing.assert_array_equal(flat[taken : taken + len(ids)], ids)
        taken += len(ids)
    assert at == "wiki"
    stats = json.loads((packed / "out" / "stats.json").read_text())
    assert stats["mixture"] == {"wiki": 25, "code": 75}
    assert [done["blocks"] for done in stats["sources"]["wiki"]] == [blocks_of(1000, 25, 32), blocks_of(500, 25, 48)]


def test_packing_again_gives_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    asked = ["--train-data", str(packed), "--mixture", str(packed / "mix.json"), "--num-token", "32:1k", "48:500"]
    pack(tmp_path / "again", *asked)
    for file in (packed / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_the_folder_of_the_guide_is_packed_where_none_is_named(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEACON_DATA_ROOT", str(tmp_path))
    asked = ["--mixture", str(packed / "mix.json"), "--num-token", "32:1k", "48:500"]
    assert f"train_data: {tmp_path / 'slimpajama'} is no folder" in pack(tmp_path / "none", *asked, code=2)
    (tmp_path / "slimpajama").symlink_to(packed)
    pack(tmp_path / "out", *asked)
    for file in ("stats.json", "data-00000-of-00001.arrow"):
        assert (packed / "out" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_what_cannot_be_packed_is_named(packed: Path, tmp_path: Path) -> None:
    folder = ["--train-data", str(packed)]
    mixed = [*folder, "--mixture", str(packed / "mix.json")]
    out = tmp_path / "out"
    assert "num_token: code has" in pack(out, *mixed, "--num-token", "32:1m", code=2)
    assert "the mixture names arxiv" in pack(out, *folder, "--num-token", "32:1k", code=2)
    assert "num_token: '32' is no LENGTH:COUNT" in pack(out, *mixed, "--num-token", "32", code=2)
    assert "is no SOURCE=DATA" in pack(out, "--train-data", "a", "b", code=2)
    assert not out.exists()
    said = pack(out, *mixed, "--num-token", "32:1m", "--allow-missing", "--short-documents", "drop", "--min-doc-length", "20")
    assert "short" in said
    assert "tokens behind the last block left out" in said
    for name in ("slimpajama", "even", "code"):
        assert 99 < sum(mixture(name, {}, True).values()) <= 100.5
    (tmp_path / "more.json").write_text('{"wiki": 90, "code": 20}')
    with pytest.raises(ConfigError, match="sum to 110"):
        mixture(str(tmp_path / "more.json"), {}, True)


# --- what a run reads ---


def config(**options: Any) -> TrainConfig:
    values = {
        "model": "llama_tiny", "tokenizer": "bytes", "data": ["synthetic:markov[40]"], "beacon_window": 32, "max_length": 400,
        "chat_template": "mistral", "beacon_ratio": [2], **options,
    }  # fmt: skip
    return build(TrainConfig, values)


def data_of(**options: Any) -> Any:
    asked = config(**options)
    return training_data(asked, BeaconConfig(window=28, stride=28, ratio=[2], doc_mask=bool(asked.beacon_doc_mask)), WORDS, 1)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        {"conversations": [{"role": "user", "content": "q" * asked}, {"role": "assistant", "content": "a" * said}]}
        # in order: taught, below min_length, above max_length, taught
        for asked, said in ((20, 60), (1, 5), (50, 400), (100, 7))
    ]
    # an answer inside the first window teaches nothing
    rows.append({"conversations": [*rows[1]["conversations"], {"role": "user", "content": "q" * 60}]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_kinds_are_told_apart_and_joined(packed: Path, chats: Path) -> None:
    data = data_of(data=[f"{packed}/out[7]", str(chats), "synthetic:markov[40]"], beacon_doc_mask=True, packing="best-fit", min_length=40)
    assert list(data.train) == ["out", "chats", "markov"]
    assert [len(rows) for rows in data.train.values()][:2] == [7, 2]
    lengths = [data.train["chats"].length(k) for k in range(2)]
    around = len("<s>[INST]  [/INST] </s>")
    assert lengths == [20 + 60 + around, 100 + 7 + around]
    row = data.train["chats"][1]
    assert (row["labels"] != -100).sum() == 7 + len("</s>")
    assert row["document_ids"].tolist() == [0] * lengths[1]
    batch = data.train["out"].collate([data.train["out"][0], row])
    assert set(batch) == {"input_ids", "labels", "document_ids", "attention_mask"}
    assert data.weights == {name: len(rows) for name, rows in data.train.items()}


def test_nothing_is_held_out_unless_it_is_scored(packed: Path) -> None:
    text = str(packed / "wiki.jsonl")
    assert not data_of(data=[text], packing="stream", max_length=40).valid
    assert data_of(data=[text], packing="stream", max_length=40, eval_every="2").valid


def test_empty_and_wrong_data_is_named(packed: Path, chats: Path) -> None:
    with pytest.raises(InputError, match=r"chats keeps none of its 5 samples .*5 above max_length"):
        data_of(data=[str(chats)], max_length=6)
    with pytest.raises(InputError, match="row 0: the id 257 is outside the vocabulary of 200"):
        Blocks(packed / "out", 200, 0)[0]
    with pytest.raises(ConfigError, match=r"group_by_stride: .* weights \(@\) have no meaning"):
        data_of(data=["synthetic:markov@0.5"], group_by_stride="strict")


# --- order ---


def test_groups_share_their_number_of_windows() -> None:
    found = np.array([3, 1, 2, 1, 2, 1, 3, 3, 2, 1, 2])
    strict = grouped(found, 2, "strict", seed=5)
    assert sorted(strict.ravel().tolist()) == sorted(set(strict.ravel().tolist()))
    assert [sorted(set(found[group].tolist())) for group in strict] == [[1], [1], [2], [2], [3]]
    relaxed = grouped(found, 2, "relaxed", seed=5)
    assert relaxed.shape == (6, 2)
    assert set(relaxed.ravel().tolist()) == set(range(11))
    assert (np.diff(found[relaxed.ravel()]) >= 0).all()
    assert found[by_windows(found, 0)].tolist() == sorted(found)
    assert by_windows(found, 0).tolist() != by_windows(found, 1).tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_every_micro_batch_is_one_group_over_all_ranks_and_epochs_differ(world: int, chats: Path) -> None:
    sizes = {"micro_batch_size": 4 // world}
    asked = config(data=["builtin:python-docs", "synthetic:markov"], group_by_stride="strict", max_length=700, **sizes)
    settings = BeaconConfig(window=32, stride=32, ratio=[2])
    data = training_data(asked, settings, WORDS, world)
    loaders = [Loader(data, micro_batch=4 // world, accumulate=2, rank=rank, world=world, seed=1) for rank in range(world)]
    epochs: list[list[tuple[int, ...]]] = [[], []]
    steps = loaders[0].epoch_samples // 8
    assert loaders[0].epoch_samples % 4 == 0
    for step in range(2 * steps):
        parts = [next(loader) for loader in loaders]
        for micro in range(2):
            rows = [row for part in parts for row in _lengths(part[micro])]
            assert len(set(windows(settings, rows))) == 1
            epochs[step // steps].append(tuple(sorted(rows)))
    assert epochs[0] != epochs[1]


def _lengths(batch: Any) -> list[int]:
    mask = batch.get("attention_mask")
    rows, columns = batch["input_ids"].shape
    return [columns] * rows if mask is None else mask.sum(1).tolist()


def test_sorted_rows_ascend_once_and_for_all() -> None:
    rows = data_of(data=["synthetic:copy[20]", "builtin:python-docs[20]"], sort_by_stride="descend")
    settings = BeaconConfig(window=28, stride=28, ratio=[2])
    found = windows(settings, [rows.train["all"].length(k) for k in range(len(rows.train["all"]))])
    assert found == sorted(found, reverse=True)
    assert rows.ordered


# --- options ---


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bf16", "--save_strategy", "epoch"], {"precision": "bf16", "save_every": "epoch"}),
        (["--evaluation_strategy", "steps", "--logging_steps", "50"], {"eval_every": "50"}),
        (["--eval_strategy", "steps", "--eval_steps", "0.2"], {"eval_every": "0.2"}),
        (["--report-to", "wandb"], {"wandb": "online", "tensorboard": False}),
        (["--report-to", "none"], {"wandb": "off", "tensorboard": False}),
        (["--adam-beta2", "0.95"], {"betas": [0.9, 0.95]}),
        (["--save_steps", "0.49", "--save_only_model", "--deepspeed", "f.json"], {"save_every": "0.49", "deepspeed_config": "f.json"}),
        (["--cpu", "True", "--enable_beacon", "--use_reentrant", "False"], {"device": "cpu"}),
    ],
)
def test_spellings_of_the_guide_mean_options_of_core(words: list[str], expected: dict[str, Any]) -> None:
    result = CliRunner().invoke(cli, ["train", "--model", "m", "--train_data", "d", *words, "--print-config", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bf16": True, "precision": "fp32"}, "bf16: True means precision bf16, but precision is fp32"),
        ({"use_reentrant": True, "beacon_engine": "loop"}, "use_reentrant: true loses"),
        ({"group_by_stride": "strict", "sort_by_stride": "ascend"}, "sort_by_stride: ascend and"),
        ({"enable_beacon": False}, "enable_beacon: false leaves nothing to train"),
        ({"lora_extra_params": ["norm"]}, "lora_extra_params: .* add it"),
        ({"lora_tune": True, "save_format": "adapter"}, "save_format: adapter would lose"),
    ],
)
def test_options_that_contradict_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**options)


def test_held_out_rows_have_limits_of_their_own() -> None:
    evaluated = {"eval_every": "1", "max_length": 300}
    plain = data_of(**evaluated)
    limited = data_of(**evaluated, eval_max_length=120, eval_min_length=90, max_eval_num=1)
    for one, other in zip(plain.train.values(), limited.train.values()):
        assert one.fingerprint == other.fingerprint
    (held,), (cut,) = plain.valid.values(), limited.valid.values()
    assert len(cut) == 1 < len(held)
    assert cut.length(0) == 120
    assert np.array_equal(cut[0]["input_ids"], held[0]["input_ids"][:120])
    given = data_of(**evaluated, eval_data=["synthetic:markov[5]"], eval_max_length=150)
    assert {given.valid["markov"].length(k) for k in range(5)} == {150}
    with pytest.raises(InputError, match="eval_min_length: markov holds out no row of 9999 tokens"):
        data_of(**evaluated, eval_min_length=9999)
