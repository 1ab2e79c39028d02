from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lm_core.data import synthetic
from lm_core.data.vocab import build_tokenizer, byte_tokenizer, fingerprint, train_bpe
from lm_core.errors import ConfigError, InputError

BYTES = byte_tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example(" n't  a .\r\n\t\x00 é😀")
def test_ids_of_the_byte_tokenizer_are_the_bytes(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_special_tokens_follow_the_bytes() -> None:
    assert (len(BYTES), BYTES.pad_token_id, BYTES.bos_token_id, BYTES.eos_token_id) == (259, 256, 257, 258)
    assert BYTES.decode([104, 105, 258, 256], skip_special_tokens=True) == "hi"
    assert isinstance(BYTES, PreTrainedTokenizerFast)


def test_saved_tokenizers_come_back_through_auto_tokenizer(tmp_path: Path) -> None:
    for name, tokenizer in {"bytes": BYTES, "bpe": train_bpe(synthetic.recall(), 300)}.items():
        tokenizer.save_pretrained(str(tmp_path / name))
        again = AutoTokenizer.from_pretrained(str(tmp_path / name))
        text = "k01=v02  naïve\n<eos>"
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == text
        assert fingerprint(again) == fingerprint(tokenizer)
        assert (again.pad_token_id, again.eos_token_id, len(again)) == (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer))


def test_a_trained_encoding_has_its_size_and_shortens_its_corpus() -> None:
    tokenizer = train_bpe(synthetic.markov(), 400)
    text = next(synthetic.markov())
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 400
    assert max(ids) < 400
    assert len(ids) < len(text) / 2
    assert tokenizer.decode(ids) == text


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert fingerprint(train_bpe(synthetic.copy(), 300)) == fingerprint(train_bpe(synthetic.copy(), 300))
    assert fingerprint(train_bpe(synthetic.copy(), 300)) != fingerprint(train_bpe(synthetic.recall(), 300))


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="bpe:100 is too small"):
        train_bpe(["text"], 100)
    with pytest.raises(InputError, match=r"only \d+ of 5000 entries"):
        train_bpe(["text"], 5000)


def test_the_options_name_a_tokenizer(options, own_cache: Path) -> None:
    assert fingerprint(build_tokenizer(options(tokenizer="bytes"))) == fingerprint(BYTES)
    assert fingerprint(build_tokenizer(options(tokenizer=None, model="bytes"))) == fingerprint(BYTES)
    trained = build_tokenizer(options(tokenizer="bpe:300", data=["synthetic:copy"]))
    kept = [path.name for path in (own_cache / "tokenizers").iterdir() if not path.name.startswith(".")]
    assert len(kept) == 1
    assert fingerprint(build_tokenizer(options(tokenizer="bpe:300", data=["synthetic:copy@1"]))) == fingerprint(trained)


@pytest.mark.parametrize(("values", "message"), [({"tokenizer": "bpe:many"}, "bpe:4096"), ({"tokenizer": "bpe:300"}, "give --data")])
def test_a_trained_tokenizer_needs_a_size_and_data(options, values, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(options(**values))


def test_held_out_documents_are_not_trained_on(tmp_path: Path, options) -> None:
    from lm_core.data.shards import key_of

    texts = [f"{'abcdefghij'[n % 10] * 4}{n}" for n in range(200)]
    held = [text for text in texts if key_of(text) >= 0.5 * 2.0**64]
    kept = [text for text in texts if text not in held]
    for name, some in [("all", texts), ("kept", kept)]:
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in some))
    a = build_tokenizer(options(tokenizer="bpe:300", data=[str(tmp_path / "all.jsonl")], hold_out=0.5))
    b = build_tokenizer(options(tokenizer="bpe:300", data=[str(tmp_path / "kept.jsonl")], hold_out=0.0))
    assert fingerprint(a) == fingerprint(b)
