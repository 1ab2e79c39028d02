"""The mixer against its formulas, written down a second time in float64, one token after the other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rwkv_distill.mixers import Rwkv7Mixer
from tests.rwkv_distill.small import KINDS, SHAPE, student


def by_formula(mixer: Any, h_TD: Tensor, v_first_TA: Tensor | None, cos_Tn: Tensor, sin_Tn: Tensor) -> Tensor:
    """Section 6.2 of the specification for one sequence, with nothing but elementary operations."""
    w = {name: value.detach().double() for name, value in mixer.named_parameters()}
    width, size = w["w0"].numel(), mixer.size
    heads, head = width // size, SHAPE["head_dim"]

    def vec(name: str) -> Tensor:
        return w[name].flatten()

    def linear(name: str, x: Tensor) -> Tensor:
        y = w[f"{name}.weight"] @ x
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def sigmoid(x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-x))

    def rms(x_hn: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([row / math.sqrt(float((row * row).mean()) + 1e-6) * weight for row in x_hn])

    def rope(x_hn: Tensor, t: int) -> Tensor:
        half = head // 2
        return torch.stack(
            [
                torch.cat(
                    [
                        row[:half] * cos_Tn[t, :half] - row[half:] * sin_Tn[t, :half],
                        row[half:] * cos_Tn[t, half:] + row[:half] * sin_Tn[t, half:],
                    ]
                )
                for row in x_hn
            ]
        )

    state = torch.zeros(heads, size, size, dtype=torch.float64)
    outputs = []
    for t in range(len(h_TD)):
        h = h_TD[t]
        before = h_TD[t - 1] if t else torch.zeros_like(h)
        x = {n: h + (before - h) * vec(f"x_{n}") if f"x_{n}" in w else h for n in "rwkvag"}
        r, k, v = linear("receptance", x["r"]), linear("key", x["k"]), linear("value", x["v"])
        r, k = r.view(-1, head), k.view(-1, head)
        if "r_norm.weight" in w:
            r, k = rms(r, w["r_norm.weight"]), rms(k, w["k_norm.weight"])
        if mixer.rope:
            r, k = rope(r, t), rope(k, t)
        times = width // (k.numel())
        k = torch.cat([k[j : j + 1] for j in range(len(k)) for _ in range(times)])
        v = torch.cat([v.view(-1, head)[j : j + 1] for j in range(len(k) // times) for _ in range(times)])
        r, k, v = r.flatten(), k.flatten(), v.flatten()
        decay = torch.exp(-math.exp(-0.5) * sigmoid(vec("w0") + torch.tanh(x["w"] @ w["w1"]) @ w["w2"]))
        a = sigmoid(vec("a0") + (x["a"] @ w["a1"]) @ w["a2"])
        if "v0" in w:
            assert v_first_TA is not None
            v = v + (v_first_TA[t] - v) * sigmoid(vec("v0") + (x["v"] @ w["v1"]) @ w["v2"])
        kk = (k * vec("k_k")).view(heads, size)
        kk = kk / kk.norm(dim=-1, keepdim=True)
        k = (k * (1 + (a - 1) * vec("k_a"))).view(heads, size)
        r, v, a, decay = r.view(heads, size), v.view(heads, size), a.view(heads, size), decay.view(heads, size)
        y = torch.zeros(heads, size, dtype=torch.float64)
        for i in range(heads):
            removed = state[i] @ -kk[i]
            state[i] = state[i] * decay[i] + torch.outer(removed, kk[i] * a[i]) + torch.outer(v[i], k[i])
            y[i] = state[i] @ r[i]
        if "ln_x.weight" in w:
            y = (y - y.mean(1, keepdim=True)) / torch.sqrt(y.var(1, unbiased=False, keepdim=True) + size * 1e-5)
            y = (y.flatten() * w["ln_x.weight"] + w["ln_x.bias"]).view(heads, size)
        else:
            y = y * mixer.scale
        if "r_k" in w:
            y = y + (r * k * w["r_k"]).sum(1, keepdim=True) * v
        y = y.flatten()
        if mixer.gate != "none":
            gate = sigmoid(x["g"] @ w["g1"]) @ w["g2"]
            y = y * (gate if mixer.gate == "sigmoid" else 1 + gate)
        outputs.append(linear("output", y))
    return torch.stack(outputs)


def by_formula_6(mixer: Any, h_TD: Tensor) -> Tensor:
    """Section 6.3 of the specification for one sequence of a student that does not rotate, the same way."""
    w = {name: value.detach().double() for name, value in mixer.named_parameters()}
    width, size = w["w0"].numel(), mixer.size
    heads = width // size
    state = torch.zeros(heads, size, size, dtype=torch.float64)
    outputs = []
    for t in range(len(h_TD)):
        h = h_TD[t]
        past = (h_TD[t - 1] if t else torch.zeros_like(h)) - h
        x = dict.fromkeys("wkvrg", h)
        if mixer.token_shift:
            low = torch.tanh((h + past * w["x_x"].flatten()) @ w["m1"])
            for n, name in enumerate(mixer.inputs):
                x[name] = h + past * (w[f"x_{name}"].flatten() + low[32 * n : 32 * n + 32] @ w["m2"][n])
        r, k, v = (w[f"{name}.weight"] @ x[name[0]] for name in ("receptance", "key", "value"))
        times = width // len(k)
        k, v = (torch.cat([part.view(-1, 32)[j] for j in range(len(part) // 32) for _ in range(times)]) for part in (k, v))
        logit = w["w0"].flatten() + torch.tanh(x["w"] @ w["w1"]) @ w["w2"]
        decay = torch.exp(-torch.minimum(torch.exp(logit), torch.tensor(5.0, dtype=torch.float64))).view(heads, size)
        r, k, v = r.view(heads, size), k.view(heads, size), v.view(heads, size)
        y = torch.stack([(state[i] + torch.outer(v[i], w["u"][i] * k[i])) @ r[i] for i in range(heads)])
        state = torch.stack([state[i] * decay[i] + torch.outer(v[i], k[i]) for i in range(heads)])
        if "ln_x.weight" in w:
            y = (y - y.mean(1, keepdim=True)) / torch.sqrt(y.var(1, unbiased=False, keepdim=True) + size * 1e-5)
            y = y * w["ln_x.weight"].view(heads, size) + w["ln_x.bias"].view(heads, size)
        y = y.flatten() * mixer.scale
        if mixer.gating != "none":
            gate = w["gate.weight"] @ x["g"]
            gate = gate / (1 + torch.exp(-gate))
            y = y * (gate if mixer.gating == "sigmoid" else 1 + gate)
        outputs.append(w["output.weight"] @ y)
    return torch.stack(outputs)


def angles(length: int) -> tuple[Tensor, Tensor]:
    frequency = 10000 ** -(torch.arange(0, SHAPE["head_dim"], 2) / SHAPE["head_dim"])
    angle = torch.arange(length)[:, None] * torch.cat([frequency, frequency])
    return angle.cos()[None], angle.sin()[None]


FIELDS = [
    {"preset": "arwkv"},
    {"preset": "rad"},
    {"preset": "arwkv", "group_norm": True, "gate": "sigmoid", "head_size": 128},
    {"preset": "arwkv", "gate": "none", "value_residual": False, "qkv_bias": True, "head_size": 32, "wkv_scale": True},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("layer", [0, 2])
def test_mixer_equals_its_formulas(kind: str, fields: dict[str, Any], layer: int) -> None:
    mixer = student(kind, **fields).mixers()[layer]
    torch.manual_seed(2)
    h, v_first = torch.randn(2, 11, 48), torch.randn(2, 11, 128)
    cos, sin = angles(11)
    out, _, _ = mixer(h, v_first, position_embeddings=(cos, sin))
    expected = torch.stack([by_formula(mixer, row.double(), v.double(), cos[0].double(), sin[0].double()) for row, v in zip(h, v_first)])
    torch.testing.assert_close(out.double(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"preset": "rad", "rope": False, "qkv_bias": False},
        {"gate": "sigmoid", "head_size": 32, "wkv_scale": True},
        {"gate": "none", "token_shift": True, "kv_heads": "grouped", "head_size": 32},
    ],
    ids=str,
)
def test_mixer_of_version_6_equals_its_formulas(fields: dict[str, Any]) -> None:
    mixer = student("llama", rwkv_version="v6", **fields).mixers()[1]
    torch.manual_seed(2)
    with torch.no_grad():
        # beyond the fastest decay in places
        mixer.w0.add_(4 * torch.rand_like(mixer.w0))
        if mixer.gate is not None:
            mixer.gate.weight.normal_(std=0.1)
    h = torch.randn(2, 11, 48)
    out, v_first, _ = mixer(h)
    assert v_first is None
    expected = torch.stack([by_formula_6(mixer, row.double()) for row in h])
    torch.testing.assert_close(out.double(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_names_are_those_of_arwkv_checkpoints(kind: str) -> None:
    expected = {
        "x_r",
        "x_w",
        "x_k",
        "x_v",
        "x_a",
        "x_g",
        "w0",
        "w1",
        "w2",
        "a0",
        "a1",
        "a2",
        "v0",
        "v1",
        "v2",
        "g1",
        "g2",
        "k_k",
        "k_a",
        "r_k",
    }
    expected |= {f"{name}.weight" for name in ("receptance", "key", "value", "output")}
    expected |= {"r_norm.weight", "k_norm.weight"} if kind == "qwen3" else set()
    mixers = student(kind).mixers()
    assert {name for name, _ in mixers[1].named_parameters()} == expected
    # the first RWKV layer defines the value that later ones mix in
    assert expected - {name for name, _ in mixers[0].named_parameters()} == {"v0", "v1", "v2"}


def test_a_sequence_equals_its_parts_with_the_state_carried_over() -> None:
    mixer = student().mixers()[0]
    h = torch.randn(2, 9, 48)
    whole, _, _ = mixer(h)
    first, _, state = mixer(h[:, :4])
    second, _, state = mixer(h[:, 4:8], state=state)
    with torch.no_grad():
        third, _, _ = mixer(h[:, 8:], state=state)
    torch.testing.assert_close(torch.cat([first, second, third], 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_gets_no_gradient(side: str) -> None:
    mixer = student().mixers()[0]
    h = torch.randn(1, 6, 48)
    place = slice(3, 9) if side == "left" else slice(0, 6)
    padded = torch.full((1, 9, 48), 7.0)
    padded[:, place] = h
    padded.requires_grad_()
    mask = torch.zeros(1, 9, dtype=torch.long)
    mask[:, place] = 1
    alone, _, alone_state = mixer(h)
    out, _, state = mixer(padded, mask=mask)
    torch.testing.assert_close(out[:, place], alone, rtol=1e-5, atol=1e-5)
    for mine, expected in zip(state, alone_state):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    out[:, place].square().sum().backward()
    assert not padded.grad[mask == 0].any()


def test_a_later_layer_refuses_to_run_without_the_first_value() -> None:
    mixer = student().mixers()[1]
    with pytest.raises(ValueError, match="v_first"):
        mixer(torch.zeros(1, 2, 48))
    assert isinstance(mixer, Rwkv7Mixer)
