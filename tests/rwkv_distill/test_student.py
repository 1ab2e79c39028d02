"""The student beside its teacher: what stays the same, what is copied, what packing and padding may not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lm_core.errors import ConfigError
from rwkv_distill.init import repeated
from rwkv_distill.student import StudentModel, load_student
from rwkv_distill.student_config import StudentConfig
from tests.rwkv_distill.small import KINDS, student, teacher, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_whose_layers_all_stay_softmax_is_the_teacher(kind: str) -> None:
    model, ids = teacher(kind), tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    expected, masked = model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits
    same = StudentModel.from_teacher(model, StudentConfig(layers=[])).eval()
    assert torch.equal(same(ids).logits, expected)
    assert torch.equal(same(ids, attention_mask=mask).logits[mask == 1], masked[mask == 1])


@pytest.mark.parametrize(
    "fields", [{"preset": "arwkv"}, {"preset": "rad"}, {"preset": "rad", "layers": [1]}, {"rwkv_version": "v6"}], ids=str
)
def test_packed_equals_padded_on_either_side_equals_alone(fields: dict[str, Any]) -> None:
    model = student("qwen2", **fields)
    first, second = tokens(1, 7), tokens(1, 5, seed=1)
    alone = [model(first).logits[0], model(second).logits[0]]
    packed = model(torch.cat([first, second], 1), segment_ids=torch.tensor([[0] * 7 + [1] * 5])).logits[0].split([7, 5])
    pad = torch.full((1, 2), 60)
    for filled, place in ((torch.cat([second, pad], 1), slice(0, 5)), (torch.cat([pad, second], 1), slice(2, 7))):
        mask = torch.zeros(2, 7, dtype=torch.long)
        mask[0], mask[1, place] = 1, 1
        padded = model(torch.cat([first, filled]), attention_mask=mask).logits
        torch.testing.assert_close(padded[0], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(padded[1, place], alone[1], rtol=1e-4, atol=1e-5)
    for mine, expected in zip(packed, alone):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [{"preset": "arwkv"}, {"preset": "rad"}, {"preset": "rad", "layers": [0, 2]}, {"rwkv_version": "v6", "preset": "rad"}],
    ids=str,
)
def test_tokens_one_by_one_equal_the_whole_text(fields: dict[str, Any]) -> None:
    model, ids = student("qwen3", **fields), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    whole = model(ids, attention_mask=mask).logits
    with torch.no_grad():
        out = model(ids[:, :6], attention_mask=mask[:, :6], return_state=True)
        parts = [out.logits]
        for t in range(6, 12):
            out = model(ids[:, t : t + 1], state=out.state)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], whole[mask == 1], rtol=1e-4, atol=1e-5)
    assert out.state.positions.tolist() == [12, 9]


def test_state_has_the_same_size_after_any_number_of_tokens() -> None:
    model = student()
    with torch.no_grad():
        state = model(tokens(1, 3), return_state=True).state
        before = state.bytes()
        model(tokens(1, 40), state=state)
    # per layer: the last input and a matrix per head, in float32
    assert state.bytes() == before == 3 * (48 + 128 * 64) * 4


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_copied_projections_give_every_query_head_its_key_and_value(kind: str) -> None:
    model = teacher(kind)
    attention = model.model.layers[1].self_attn
    mixer = StudentModel.from_teacher(model, StudentConfig(qkv_bias=True)).mixers()[1]
    h = torch.randn(5, 48)
    # by query head j: the key of head j // 2
    expand = torch.eye(2).repeat_interleave(2, 0)
    keys = torch.einsum("jg,tgn->tjn", expand, attention.k_proj(h).view(5, 2, 32))
    torch.testing.assert_close(mixer.key(h).view(5, 4, 32), keys)
    values = torch.einsum("jg,tgn->tjn", expand, attention.v_proj(h).view(5, 2, 32))
    torch.testing.assert_close(mixer.value(h).view(5, 4, 32), values)
    torch.testing.assert_close(mixer.receptance(h), attention.q_proj(h))
    assert torch.equal(mixer.output.weight, attention.o_proj.weight)


def test_repeated_rows_of_a_head_stay_together() -> None:
    assert repeated(torch.arange(4), 8, 2).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]


def test_a_new_student_adds_nothing_by_its_new_parts() -> None:
    """Zero factors: no token shift, constant decay and rates, a gate of one, no bonus."""
    mixer = student(busy=False).mixers()[2]
    assert not any(getattr(mixer, name).any() for name in ("x_r", "x_k", "w1", "a1", "v1", "g2", "r_k", "a0"))
    assert all(getattr(mixer, name).norm() > 0 for name in ("w2", "a2", "v2", "g1"))
    assert mixer.w0.flatten()[[0, -1]].tolist() == pytest.approx([-6.5, -1.5])
    random = student(busy=False, init="random").mixers()[0]
    assert random.x_r[0, 0, 0] == 1
    assert random.x_k.min() >= 0


def test_a_new_student_of_version_6_begins_as_its_formulas_say() -> None:
    first, last = (student(busy=False, rwkv_version="v6", token_shift_init="rwkv").mixers()[layer] for layer in (0, 2))
    assert first.x_v[0, 0, 12].item() == pytest.approx(1 - 12 / 48)
    # q = 1/3 in the last of three layers
    assert last.x_v[0, 0, 12].item() == pytest.approx(1 - (12 / 48) ** (1 / 3) - 0.3)
    assert last.x_r[0, 0, 12].item() == pytest.approx(1 - (12 / 48) ** (1 / 6))
    assert first.w0.flatten()[[0, -1]].tolist() == last.w0.flatten()[[0, -1]].tolist() == [-6, -1]
    assert last.w0[0, 0, 64].item() == pytest.approx(-6 + 5 * (64 / 127) ** 2)
    assert last.u.flatten()[[0, 1, 2]].tolist() == pytest.approx([1, 1 - 1 / 127 + 0.1, 1 - 2 / 127 - 0.1])
    assert not first.gate.weight.any()
    assert student(busy=False, rwkv_version="v6", gate="sigmoid").mixers()[0].gate.weight.any()
    assert 0 < first.m2.abs().max() <= 1e-4


@pytest.mark.parametrize("fields", [{"preset": "arwkv", "gate": "sigmoid"}, {"preset": "rad", "layers": [0, 2]}], ids=str)
def test_a_saved_student_loads_as_it_was(fields: dict[str, Any], tmp_path: Any) -> None:
    model = student("qwen3", **fields)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_student(tmp_path).eval()(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_size": 64, "preset": "rad"}, "rope: rotation needs heads of the teacher's size 32"),
        ({"layers": [0, 3]}, "layers: 3 is out of range; the teacher has layers 0 to 2"),
    ],
)
def test_students_that_do_not_fit_their_teacher_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        student(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [1, 1]}, "layers: .* twice"),
        ({"layers": [-1]}, "layers: -1"),
        ({"lora": {"key": 3}}, "lora: key is no low-rank part"),
        ({"lora": {"gate": 0}}, "lora: the rank of gate is 0"),
    ],
)
def test_wrong_students_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StudentConfig(**fields)


def test_other_teachers_are_refused_by_name() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=61, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="gpt2 is not supported; use one of llama"):
        StudentModel.from_teacher(model)
