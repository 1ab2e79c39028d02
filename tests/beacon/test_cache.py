from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from beacon.cache import BeaconCache
from beacon.config import BeaconConfig
from beacon.errors import CacheError
from beacon.plan import build_plan
from tests.beacon.small import beacon_model, ids

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
MODES: list[dict[str, Any]] = [{}, {"stride": 4}, {"pos": "interleave"}, {"pos": "interleave", "attend_prev": False}]
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def model(**config: Any) -> Any:
    return beacon_model(ratio=[2, 1, 0], sink_size=1, inference_ratio_mix="sequence", **config)


@each_mode
def test_lengths_and_bytes_follow_the_formula(mode: dict[str, Any]) -> None:
    reader = model(**mode)
    config: BeaconConfig = reader.beacon
    for n in range(1, 6 * config.window + 1):
        cache = reader.compress(ids(1, n))
        c = config.compactions(n)
        ratios = [config.ratio[i % 3] for i in range(c + 1)]
        opened = (n - c * config.stride) // ratios[c] if config.pos == "interleave" and ratios[c] else 0
        sinks = int(c >= 1 and ratios[0] > 0) * config.sink_size
        memory = sum(config.entries(ratio) for ratio in ratios[:c])
        assert cache.lengths() == [{"sink": sinks, "memory": memory, "raw": n - c * config.stride, "open_beacons": opened, "seen": n}]
        entries = sinks + memory + n - c * config.stride + opened
        assert cache.nbytes == 2 * 3 * 2 * 8 * 8 * entries
        assert build_plan(n, config, ratios).memory_length == sinks + memory
        assert cache.compression_ratio() == [n / (entries - opened)]


@each_mode
def test_a_saved_memory_reads_on_as_if_it_had_stayed(mode: dict[str, Any], tmp_path: Path) -> None:
    reader, text, more = model(**mode), ids(1, 29), ids(1, 17, seed=5)
    expected = reader(more, past_key_values=reader.compress(text)).logits
    cache = reader.compress(text)
    cache.save(tmp_path / "text.mem")
    loaded = BeaconCache.load(tmp_path / "text.mem", reader)
    assert loaded.lengths() == cache.lengths()
    torch.testing.assert_close(reader(more, past_key_values=loaded).logits, expected, **CLOSE)
    streamed = reader.compress(iter([text[0, :5].tolist(), text[0, 5:].tolist()])).append(more[:, :9])
    torch.testing.assert_close(reader(more[:, 9:], past_key_values=streamed).logits, expected[:, 9:], **CLOSE)


@each_mode
@pytest.mark.parametrize("limits", [{}, {"memory_budget": 9, "on_budget": "evict"}], ids=["all", "evicting"])
def test_memory_written_in_place_is_that_of_copies_with_gradients(mode: dict[str, Any], limits: dict[str, Any]) -> None:
    reader, rows, mask = model(**mode, **limits), ids(3, 45), torch.ones(3, 45, dtype=torch.long)
    mask[1, :9], mask[2, :30] = 0, 0
    copied = reader(rows, attention_mask=mask).past_key_values
    with torch.no_grad():
        written = reader(rows, attention_mask=mask).past_key_values
    for one, other in zip(copied.memory, written.memory):
        for x, y in zip(one, other):
            assert x.requires_grad
            assert not y.requires_grad
            for b, cursor in enumerate(copied.cursors):
                torch.testing.assert_close(x[b, :, : len(cursor.memory)], y[b, :, : len(cursor.memory)], **CLOSE)


def test_costs_can_be_counted_without_data() -> None:
    reader = model().to("meta")
    with torch.no_grad():
        cache = reader.compress(ids(1, 30).to("meta"))
    assert cache.nbytes == model().compress(ids(1, 30)).nbytes


def test_a_memory_belongs_to_its_weights(tmp_path: Path) -> None:
    reader = model()
    reader.compress(ids(1, 20)).save(tmp_path / "text.mem")
    with torch.no_grad():
        reader.model.layers[0].self_attn.beacon_k_proj.weight[0, 0] += 1
    with pytest.raises(CacheError, match=r"memory: .* was written by a model with other weights"):
        BeaconCache.load(tmp_path / "text.mem", reader)
    (tmp_path / "other.mem").write_bytes(b"text")
    with pytest.raises(CacheError, match="is no memory file"):
        BeaconCache.load(tmp_path / "other.mem", reader)


@each_mode
def test_forks_go_their_own_ways(mode: dict[str, Any]) -> None:
    reader, text = model(**mode), ids(1, 21)
    questions = ids(3, 13, seed=7)
    cache = reader.compress(text)
    kept = cache.fork()
    together = reader(questions, past_key_values=cache.fork(3)).logits
    for question, logits in zip(questions, together):
        alone = reader(question[None], past_key_values=kept.fork()).logits
        torch.testing.assert_close(logits, alone[0], **CLOSE)
    assert kept.lengths() == cache.lengths() == reader.compress(text).lengths()


def test_rows_can_be_reordered() -> None:
    reader = model()
    rows, mask = ids(2, 26), torch.ones(2, 26, dtype=torch.long)
    mask[1, :14] = 0
    cache = reader(rows, attention_mask=mask).past_key_values
    more = ids(3, 9, seed=4)
    apart = [
        reader(more[b : b + 1], past_key_values=cache._picked(torch.tensor([row]).numpy(), copy=True)).logits[0]
        for b, row in enumerate((1, 0, 1))
    ]
    cache.reorder(torch.tensor([1, 0, 1]))
    torch.testing.assert_close(reader(more, past_key_values=cache).logits, torch.stack(apart), **CLOSE)


@each_mode
def test_the_open_window_can_be_cropped_but_memory_cannot(mode: dict[str, Any]) -> None:
    reader, text = model(**mode), ids(1, 30)
    cache = reader.compress(text[:, :22])
    limit = cache.cursors[0].uncompacted
    for left in (limit, 21):
        shorter = cache.fork()
        shorter.crop(left)
        torch.testing.assert_close(
            reader(text[:, left:], past_key_values=shorter).logits,
            reader(text[:, left:], past_key_values=reader.compress(text[:, :left])).logits,
            **CLOSE,
        )
    with pytest.raises(CacheError, match="crop: row 0 has compacted"):
        cache.crop(limit - 1)


# --- generate ---


def greedy(reader: Any, text: torch.Tensor, new: int) -> list[int]:
    """One token after the other, the whole text read anew each time."""
    for _ in range(new):
        text = torch.cat([text, reader(text).logits[:, -1:].argmax(-1)], dim=1)
    return text[0, -new:].tolist()


@each_mode
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_gives_every_row_what_it_gives_alone(mode: dict[str, Any], side: str) -> None:
    reader = model(**mode)
    reader.generation_config.eos_token_id = None
    texts = [ids(1, n, seed=n) for n in (19, 4, 11)]
    rows, mask = torch.zeros(3, 19, dtype=torch.long), torch.zeros(3, 19, dtype=torch.long)
    for b, text in enumerate(texts):
        n = text.shape[1]
        span = slice(19 - n, 19) if side == "left" else slice(0, n)
        rows[b, span], mask[b, span] = text[0], 1
    out = reader.generate(rows, attention_mask=mask, max_new_tokens=14, do_sample=False, pad_token_id=0)
    for b, text in enumerate(texts):
        assert out[b, -14:].tolist() == greedy(reader, text, 14)


def test_generate_goes_on_from_a_memory() -> None:
    reader, text, question = model(), ids(1, 21), ids(1, 6, seed=8)
    reader.generation_config.eos_token_id = None
    cache = reader.compress(text)
    out = reader.generate(question, past_key_values=cache.fork(), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out[0, :6].tolist() == question[0].tolist()
    assert out[0, 6:].tolist() == greedy(reader, torch.cat([text, question], 1), 12)
    # a chat: the same cache goes on, the last token of an answer is not yet read
    first = reader.generate(question, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    follow = torch.cat([first[:, -1:], ids(1, 3, seed=9)], 1)
    second = reader.generate(follow, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert second[0, 4:].tolist() == greedy(reader, torch.cat([text, first, follow[:, 1:]], 1), 5)


def test_beams_and_samples_are_those_of_a_cache_that_reads_everything() -> None:
    # ratio 0 is full attention, so transformers' own cache is the oracle
    reader, text = beacon_model(ratio=[0]), ids(2, 19)
    reader.generation_config.eos_token_id = None
    for options in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2}):
        found = []
        for disabled in (False, True):
            torch.manual_seed(0)
            if disabled:
                with reader.beacon_disabled():
                    found.append(reader.generate(text, max_new_tokens=13, pad_token_id=0, **options))
            else:
                found.append(reader.generate(text, max_new_tokens=13, pad_token_id=0, **options))
        assert torch.equal(*found)


def test_a_cache_of_another_batch_size_is_refused() -> None:
    reader = model()
    with pytest.raises(CacheError, match="past_key_values: the cache holds 1 rows, the prompt 2"):
        reader.generate(ids(2, 4), past_key_values=reader.compress(ids(1, 9)), max_new_tokens=2)
