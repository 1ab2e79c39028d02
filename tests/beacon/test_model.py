from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beacon.config import BeaconConfig
from beacon.errors import BackendError
from beacon.modeling import attention, tiles
from beacon.modeling.attention import attend
from beacon.plan import build_plan
from lm_core.errors import ConfigError, InputError
from lm_core.models import checkpoint_activations
from tests.beacon.small import beacon_model, dense, ids, stock

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
MODES: list[dict[str, Any]] = [
    *({"attn": attn, "attend_prev": prev} for attn in ("step-expansion", "segmentation", "full-coverage") for prev in (True, False)),
    {"pos": "interleave"},
    {"pos": "interleave", "attend_prev": False},
    {"pos": "interleave", "attend_prev": False, "attn": "segmentation"},
]
STRIDES = [(mode, stride) for mode in MODES for stride in ((8,) if "pos" in mode else (8, 4, 2))]
each_mode = pytest.mark.parametrize(
    ("mode", "stride"), STRIDES, ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)
)


# the parallel engine with every attention that has gradients; tiles of 3 queries cut across every window of these tests
ENGINES = ("loop", "parallel-eager", "parallel-auto", "parallel-sdpa")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROWS", 3)


def chosen(model: Any, engine: str) -> str:
    """Set the attention of the parallel engine; returns the engine's name."""
    name, _, attention = engine.partition("-")
    model.attn_backend = attention or "auto"
    return name


@each_mode
@pytest.mark.parametrize("documents", [False, True])
def test_engines_equal_one_dense_attention_over_the_plan(mode: dict[str, Any], stride: int, documents: bool) -> None:
    # with and without the beacons' own maps behind attention
    param = ["q", "k", "v", "o", "mlp"] if stride == 8 else ["k", "v"]
    model = beacon_model(stride=stride, ratio=[2, 1, 0], sink_size=1, param=param, **mode)
    row, ratios = ids(1, 27), [2, 1, 2, 0, 2, 1, 2, 2, 2, 1, 2, 2]
    doc = torch.tensor([[0] * 5 + [1] * 12 + [2] * 3 + [3] * 7]) if documents else None
    for training in (False, True):
        model.train(training)
        plan = build_plan(27, model.beacon, ratios, None if doc is None else doc[0], training)
        expected = dense(model, row[0], plan)
        for engine in ENGINES:
            out = model(row, ratios=ratios, doc_ids=doc, engine=chosen(model, engine), labels=row)
            torch.testing.assert_close(out.logits[0], expected, **CLOSE)
            assert int(out.token_count) == int(plan.label_mask.sum())


@each_mode
@pytest.mark.parametrize("checkpointing", [False, True])
def test_parallel_and_loop_engines_agree_in_every_gradient(mode: dict[str, Any], stride: int, checkpointing: bool) -> None:
    model = beacon_model(stride=stride, ratio=[2, 1], sink_size=1, param=["q", "k", "v", "o", "mlp"], **mode).train()
    if checkpointing:
        checkpoint_activations(model)
    model.requires_grad_(True)
    rows = ids(2, 27)
    mask = torch.ones_like(rows)
    mask[1, 21:] = 0
    found = []
    for engine in ENGINES:
        model.zero_grad()
        ratios = [2, 1, 2, 2, 1, 2, 1, 2, 2, 2, 1, 2]
        labels = rows.masked_fill(mask == 0, -100)
        out = model(rows, attention_mask=mask, labels=labels, ratios=ratios, engine=chosen(model, engine))
        out.loss.backward()
        found.append((out.loss, {name: parameter.grad for name, parameter in model.named_parameters()}))
    for other in found[1:]:
        torch.testing.assert_close(found[0][0], other[0], **CLOSE)
    last = [name for name, gradient in found[0][1].items() if gradient is None or not gradient.any()]
    idle = [f"model.layers.2.self_attn.beacon_{letter}_proj.{kind}" for letter in "qo" for kind in ("weight", "bias")]
    assert last == [*idle, *(f"model.layers.2.mlp.beacon_{part}_proj.weight" for part in ("up", "down"))]
    assert {id(parameter) for name, parameter in model.named_parameters() if "beacon_" in name and name not in last} == {
        id(parameter) for parameter in model.trainable_parameters()
    }
    for name, gradient in found[0][1].items():
        if gradient is not None:
            for other in found[1:]:
                torch.testing.assert_close(other[1][name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# --- stock transformers as oracle ---

KINDS: list[dict[str, Any]] = [
    {},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}},
    {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        }
    },
    {"kind": "qwen3"},
    {"kind": "phi3"},
]  # fmt: skip
each_family = pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])


@pytest.mark.parametrize("base", KINDS, ids=lambda base: base.get("kind") or base.get("rope_parameters", {}).get("rope_type", "default"))
@pytest.mark.parametrize(("pos", "sinks"), [("append", 0), ("append", 2), ("interleave", 1)])
def test_a_text_shorter_than_the_window_is_read_as_by_the_stock_model(base: dict[str, Any], pos: str, sinks: int) -> None:
    plain, rows = stock(torch.float32, **base), ids(2, 15)
    expected = plain(rows).logits
    model = beacon_model(torch.float32, base=base, window=16, stride=16, pos=pos, attend_prev=pos == "append", sink_size=sinks)
    torch.testing.assert_close(model(rows).logits, expected, rtol=1e-5, atol=1e-5)
    cache, steps = None, []
    for t in range(15):
        out = model(rows[:, t : t + 1], past_key_values=cache)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-5, atol=1e-5)


@each_family
@pytest.mark.parametrize("stride", [8, 4, 2])
def test_ratio_0_is_full_attention(kind: str, stride: int) -> None:
    rows = ids(2, 70)
    model = beacon_model(torch.float32, base={"kind": kind}, stride=stride, ratio=[0])
    for engine in ("loop", "parallel"):
        torch.testing.assert_close(model(rows, engine=engine).logits, stock(torch.float32, kind)(rows).logits, rtol=1e-4, atol=2e-5)


@each_family
@pytest.mark.parametrize("param", [["q", "k", "v", "o"], ["v", "mlp"]])
def test_a_fresh_beacon_over_a_whole_window_is_an_eos_token_behind_it(kind: str, param: list[str]) -> None:
    w, n = 8, 15
    rows, plain = ids(1, n), stock(torch.float32, kind)
    model = beacon_model(torch.float32, shaken=False, base={"kind": kind}, window=w, stride=w, ratio=[w], attend_prev=True, param=param)
    # [window, eos, tail]; the tail sees the eos, not the window
    inputs = torch.cat([rows[:, :w], torch.full((1, 1), 3), rows[:, w:]], dim=1)
    seen = torch.ones(n + 1, n + 1).tril().bool()
    seen[w + 1 :, :w] = False
    mask = torch.zeros(1, 1, n + 1, n + 1).masked_fill(~seen, torch.finfo(torch.float32).min)
    # in memory the beacon's key sits at 0 instead of w: the tail's positions are w + 1 .. n there and 1 .. in ours
    expected = plain(inputs, attention_mask=mask, position_ids=torch.arange(n + 1)[None]).logits
    ours = model(rows).logits
    torch.testing.assert_close(ours[:, :w], expected[:, :w], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[:, w:], expected[:, w + 1 :], rtol=1e-4, atol=1e-5)


@each_family
def test_disabled_beacons_leave_the_stock_model_bit_for_bit(kind: str) -> None:
    rows = ids(2, 40)
    model, plain = beacon_model(torch.float32, base={"kind": kind}), stock(torch.float32, kind)
    with model.beacon_disabled():
        assert torch.equal(model(rows).logits, plain(rows).logits)
    assert {name for name in model.state_dict() if "beacon_" not in name} == set(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_phi3_reads_like_the_llama_whose_matrices_it_joins() -> None:
    # no bias; the beacons' matrices have the same names in both
    options: dict[str, Any] = {"ratio": [2, 1], "sink_size": 1, "param": ["k", "v", "mlp"]}
    llama = beacon_model(base={"attention_bias": False, "rms_norm_eps": 1e-5}, **options)
    phi3 = beacon_model(base={"kind": "phi3"}, **options)
    weights = llama.state_dict()
    for layer in range(3):
        for part, names in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            prefix, joint = part.rsplit(".", 1)
            own = [weights.pop(f"model.layers.{layer}.{prefix}.{name}_proj.weight") for name in names]
            weights[f"model.layers.{layer}.{prefix}.{joint}.weight"] = torch.cat(own)
    phi3.load_state_dict(weights)
    rows = ids(2, 37)
    for keep in (0, 5):
        out = [model(rows, ratios=[2, 1], logits_to_keep=keep).logits for model in (llama, phi3)]
        torch.testing.assert_close(*out, rtol=1e-10, atol=1e-10)


def test_an_embedding_that_turns_a_part_of_each_head_is_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ConfigError, match=r"model: .* turns 4 of 8 dimensions"):
        beacon_model(base={"kind": "phi3", "rope_parameters": rope})


# --- streaming, batches, documents ---


@each_mode
@torch.no_grad()
def test_any_splitting_into_calls_equals_one_shot(mode: dict[str, Any], stride: int) -> None:
    model = beacon_model(stride=stride, ratio=[2, 1, 0], sink_size=1, inference_ratio_mix="sequence", **mode)
    rows = ids(2, 37)
    whole = model(rows)
    for pieces in ((1,) * 37, (5, 9, 1, 22), (8, 8, 8, 8, 5)):
        cache, at, logits = None, 0, []
        for size in pieces:
            out = model(rows[:, at : at + size], past_key_values=cache)
            cache, at = out.past_key_values, at + size
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **CLOSE)
        assert cache.lengths() == whole.past_key_values.lengths()


@each_mode
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("engine", ENGINES)
def test_ragged_rows_equal_single_ones(mode: dict[str, Any], stride: int, side: str, engine: str) -> None:
    model = beacon_model(stride=stride, ratio=[2, 1], sink_size=1, inference_ratio_mix="sequence", **mode)
    lengths, width = [30, 8, 3, 17], 30
    texts = [ids(1, n, seed=n) for n in lengths]
    rows, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    spans = [(width - n, width) if side == "left" else (0, n) for n in lengths]
    for b, (first, last) in enumerate(spans):
        rows[b, first:last], mask[b, first:last] = texts[b][0], 1
    engine = chosen(model, engine)
    out = model(rows, attention_mask=mask, engine=engine)
    more = ids(4, 11, seed=9)
    after = model(more, past_key_values=out.past_key_values, engine=engine)
    for b, (first, last) in enumerate(spans):
        alone = model(texts[b])
        torch.testing.assert_close(out.logits[b, first:last], alone.logits[0], **CLOSE)
        torch.testing.assert_close(after.logits[b], model(more[b : b + 1], past_key_values=alone.past_key_values).logits[0], **CLOSE)


def test_logits_to_keep_are_the_last_ones() -> None:
    model = beacon_model()
    rows = ids(2, 37)
    for engine, kept in itertools.product(("loop", "parallel"), (1, 3, 12)):
        torch.testing.assert_close(model(rows, engine=engine, logits_to_keep=kept).logits, model(rows).logits[:, -kept:], **CLOSE)


@pytest.mark.parametrize("engine", ENGINES)
def test_documents_do_not_see_each_other(engine: str) -> None:
    model = beacon_model(stride=4, ratio=[2, 4], sink_size=1).train()
    row, doc, engine = ids(1, 40), torch.tensor([[0] * 13 + [1] * 20 + [2] * 7]), chosen(model, engine)
    ratios = [2, 4] * 5
    changed = row.clone()
    changed[0, 13:33] = (changed[0, 13:33] + 1) % 61
    one, two = (model(x, doc_ids=doc, ratios=ratios, engine=engine).logits[0] for x in (row, changed))
    assert torch.equal(one[:13], two[:13])
    assert torch.equal(one[33:], two[33:])
    assert not torch.equal(one[13:33], two[13:33])
    same = model(row, doc_ids=torch.full_like(doc, 4), ratios=ratios, engine=engine).logits
    assert torch.equal(same, model(row, ratios=ratios, engine=engine).logits)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_loss_of_a_document_has_no_gradient_in_another(engine: str) -> None:
    model = beacon_model(sink_size=1).train()
    row, doc = ids(1, 40), torch.tensor([[0] * 13 + [1] * 27])
    held = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: held.append(out.requires_grad_()) or held[-1])
    logits = model(row, doc_ids=doc, ratios=[2], engine=chosen(model, engine)).logits
    # the loop embeds window by window
    gradient = torch.cat(torch.autograd.grad(logits[0, 20:].sum(), held, allow_unused=True, materialize_grads=True), dim=1)
    assert not gradient[0, :13].any()
    assert gradient[0, 13:].any()


def test_an_aligned_document_is_read_as_if_alone() -> None:
    model = beacon_model(stride=4, ratio=[2, 4], sink_size=2).eval()
    row, doc = ids(1, 40), torch.tensor([[0] * 12 + [1] * 28])
    ratios = [2, 4, 2, 4, 2, 2, 4, 4, 2]
    packed = model(row, doc_ids=doc, ratios=ratios, engine="loop").logits[:, 12:]
    alone = model(row[:, 12:], ratios=ratios[3:], engine="loop").logits
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["mistral", "phi3", "qwen2", "qwen3"])
@pytest.mark.parametrize("sliding", [None, 5])
def test_other_families_read_like_their_stock_models(kind: str, sliding: int | None) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from beacon.attach import attach_beacon

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    more = {"use_sliding_window": sliding is not None, "max_window_layers": 0} if kind.startswith("qwen") else {}
    config = AutoConfig.for_model(
        kind, **sizes, **more, sliding_window=sliding, max_position_embeddings=256, eos_token_id=3, pad_token_id=0
    )
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rows = ids(2, 15)
    expected = plain(rows).logits
    model = attach_beacon(plain, BeaconConfig(window=16, stride=16, ratio=[2], sink_size=1))
    torch.testing.assert_close(model(rows).logits, expected, rtol=1e-5, atol=1e-5)
    assert model.config.model_type == f"beacon_{kind}"
    long = ids(2, 53)
    torch.testing.assert_close(model(long, engine="parallel").logits, model(long, engine="loop").logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_equal_eager_attention_in_lower_precision(dtype: torch.dtype) -> None:
    model, rows = beacon_model(dtype, sink_size=1).train(), ids(2, 43)
    found = []
    for engine in ("parallel-eager", "parallel-auto"):
        model.zero_grad()
        out = model(rows, labels=rows, ratios=[2], engine=chosen(model, engine))
        out.loss.backward()
        found.append([out.logits, *(parameter.grad for parameter in model.trainable_parameters())])
    for one, other in zip(*found):
        assert other.dtype == dtype
        assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 5e-2) * one.norm()


@pytest.mark.parametrize("documents", [False, True])
def test_flex_attention_equals_eager_attention_and_has_no_gradients_here(documents: bool) -> None:
    model, rows = beacon_model(torch.float32, stride=4, ratio=[2, 4], sink_size=1), ids(2, 43)
    doc = torch.tensor([[0] * 9 + [1] * 34, [0] * 43]) if documents else None
    mask = torch.ones_like(rows)
    mask[1, :7] = 0
    options = {"ratios": [2, 4], "attention_mask": None if documents else mask, "doc_ids": doc}
    with torch.no_grad():
        one, other = (model(rows, engine=chosen(model, f"parallel-{name}"), **options).logits for name in ("eager", "flex"))
    real = torch.ones_like(mask) if documents else mask
    torch.testing.assert_close(one[real == 1], other[real == 1], rtol=1e-4, atol=1e-5)
    with pytest.raises(BackendError, match="attn_impl: flex has no gradients on a CPU"):
        model.train()(rows, labels=rows, ratios=[2, 4])


def test_tiles_compute_little_that_is_hidden() -> None:
    local = np.tril(np.ones((1, 2, 8, 8), dtype=bool))
    memory = np.zeros((1, 2, 8, 4), dtype=bool)
    memory[:, 1, :, 1:4] = True
    made = tiles.make_tiles([8, 7], local, memory, torch.float32, torch.device("cpu"))
    assert [(tile.segment, tile.rows.stop, tile.columns.start, tile.columns.stop) for tile in made.tiles] == [
        (0, 3, 0, 3), (0, 6, 0, 6), (0, 8, 0, 8), (1, 3, 1, 7), (1, 6, 1, 10), (1, 7, 1, 11),
    ]  # fmt: skip
    # memory and the first key are seen by all rows of the tile; the last tile has one row, which sees everything
    assert [tile.hidden_from for tile in made.tiles[3:]] == [4, 7, 10]
    assert made.tiles[5].hidden_BtN is None


@pytest.mark.parametrize(
    "mode", [{}, {"pos": "interleave", "attend_prev": False}, {"sliding_window": 3}], ids=["prefix", "masked", "sliding"]
)
def test_one_token_attends_memory_and_window_by_operators(mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In place where it sees the whole window, else in two parts that are joined; rows of unequal length decode together."""
    called = []
    for name in ("decode_attention", "segment_merge"):
        plain = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *given, name=name, plain=plain: called.append(name) or plain(*given))
    model = beacon_model(**{key: value for key, value in mode.items() if key != "sliding_window"})
    monkeypatch.setattr(type(model), "sliding_window", lambda self: mode.get("sliding_window"))
    rows, mask = ids(2, 31), torch.ones(2, 31, dtype=torch.long)
    mask[1, :9] = 0
    found = []
    with torch.no_grad():
        for backend in ("eager", "auto"):
            model.attn_backend = backend
            cache = model(rows, attention_mask=mask).past_key_values
            assert not called
            found.append([model(ids(2, 1, seed=n), past_key_values=cache).logits for n in range(6)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, **CLOSE)
    assert ("segment_merge" in called) == bool(mode)
    assert "decode_attention" in called


def test_padding_inside_a_row_is_refused() -> None:
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(InputError, match="attention_mask: row 0 has padding between"):
        beacon_model()(ids(1, 9), attention_mask=mask)


def test_an_unknown_architecture_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from beacon.attach import attach_beacon

    with pytest.raises(ConfigError, match=r"model: the architecture gpt2 .*supported: llama, mistral, phi3, qwen2, qwen3"):
        attach_beacon(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)), BeaconConfig())


@pytest.mark.parametrize("masked", [False, True])
def test_scores_made_in_place_are_those_of_the_softmax(masked: bool) -> None:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v, memory = draw(2, 1, 3, 4, 8), draw(2, 1, 5, 2, 8), draw(2, 1, 5, 2, 8), (draw(2, 2, 7, 8), draw(2, 2, 7, 8))
    local, far = (draw(2, 1, 3, columns) > 0 if masked else None for columns in (5, 7))
    if local is not None:
        local[..., 0] = True
    expected = attend(q, k, v, local, memory, far, 0.3)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, local, memory, far, 0.3), expected, rtol=1e-12, atol=1e-12)
