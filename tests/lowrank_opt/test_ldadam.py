"""LDAdam against a float64 writing of section 10.8 of the specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lm_core.errors import ConfigError, RunFailed
from lowrank_opt import AdamW, LDAdamW

SHAPES = {"tall": (14, 6), "wide": (6, 14)}
STEPS, LR, RHO = 12, 1e-2, 0.7
B1, B2 = 0.9, 0.98


def gradients(shape, steps=STEPS, seed=1):
    """Drifting gradients with a clear order of singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, size, generator=generator) for size in shape)
    small = min(shape)
    for _ in range(steps):
        left, right = (side + 0.1 * torch.randn(side.shape, generator=generator) for side in (left, right))
        yield (torch.linalg.qr(left).Q[:, :small] * 2.0 ** -torch.arange(small)) @ torch.linalg.qr(right).Q[:, :small].t()


def weight_of(shape, dtype=torch.float32):
    return nn.Parameter((0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype))


def train(optimizer, weight, shape):
    for gradient in gradients(shape):
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    return weight.detach().double()


def signed(rows):
    return rows * np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)])[:, None]


def reference(weight, shape, rank, decay, feedback):
    """Every matrix whole, on the k x d orientation of side left."""
    turn = (lambda x: x.T) if shape[0] >= shape[1] else (lambda x: x)
    w = turn(weight.detach().double().numpy().copy())
    m = v = error = p = 0.0
    for t, gradient in enumerate(gradients(shape), start=1):
        a = turn(gradient.double().numpy()) + (error if feedback else 0)
        lost = 0.0
        if t == 1:
            p = signed(np.linalg.svd(a)[0][:, :rank].T)
            m, v = np.zeros((rank, a.shape[1])), np.zeros((rank, a.shape[1]))
        else:
            old, old_m = p, m
            b = RHO * old.T @ (m / (1 - B1 ** (t - 1))) + (1 - RHO) * a
            p = signed(np.linalg.qr(b @ (b.T @ old.T))[0].T)
            c = p @ old.T
            mean, square = m / (1 - B1 ** (t - 1)), v / (1 - B2 ** (t - 1))
            moved = c @ mean
            m = moved * (1 - B1 ** (t - 1))
            v = np.abs((c * c) @ (square - mean * mean) + moved * moved) * (1 - B2 ** (t - 1))
            lost = B1 / (1 - B1) * (old.T @ old_m - p.T @ m)
        low = p @ a
        error = a - p.T @ low + lost
        m, v = B1 * m + (1 - B1) * low, B2 * v + (1 - B2) * low**2
        n = (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + 1e-8)
        w = (1 - LR * decay) * w - LR * p.T @ n
    return torch.tensor(turn(w).copy())


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_a_float64_reference(shape, feedback):
    weight = weight_of(shape, torch.float64)
    expected = reference(weight, shape, 3, 0.1, feedback)
    optimizer = LDAdamW([weight], lr=LR, betas=(B1, B2), weight_decay=0.1, rank=3, rho=RHO, error_feedback=feedback, proj_dtype="param")
    # float64, since what a power iteration leaves out grows from step to step
    torch.testing.assert_close(train(optimizer, weight, shape), expected, rtol=0, atol=1e-8)


def test_float32_follows_float64():
    found = {dtype: weight_of((14, 6), dtype) for dtype in (torch.float32, torch.float64)}
    for weight in found.values():
        train(LDAdamW([weight], lr=LR, rank=3), weight, (14, 6))
    torch.testing.assert_close(found[torch.float32].double(), found[torch.float64], rtol=0, atol=1e-3)


def test_nothing_of_a_gradient_is_lost():
    weight = weight_of((14, 6))
    optimizer = LDAdamW([weight], rank=2)
    weight.grad = next(gradients((14, 6)))
    optimizer.step()
    state = optimizer.state[weight]
    inside = weight.grad @ state["proj"].t() @ state["proj"]
    torch.testing.assert_close(state["error"] + inside, weight.grad, rtol=0, atol=1e-6)
    assert (state["error"] @ state["proj"].t()).norm() < 1e-5


def test_a_full_rank_is_adamw_and_the_state_is_its_formula():
    ours, theirs = weight_of((8, 6)), weight_of((8, 6))
    train(LDAdamW([ours], lr=LR, rank=6), ours, (8, 6))
    train(AdamW([theirs], lr=LR, betas=(0.908, 0.99)), theirs, (8, 6))
    torch.testing.assert_close(ours, theirs)
    optimizer = LDAdamW([weight := weight_of((14, 6), torch.bfloat16)], rank=2)
    weight.grad = torch.randn(14, 6).bfloat16()
    optimizer.step()
    assert optimizer.state_bytes() == 8 * 2 * 14 + 2 * 2 * 6 + 4 * 14 * 6 == optimizer.predicted_state_bytes()


def test_a_gradient_of_zeros_and_one_that_is_not_finite():
    weight = weight_of((8, 6))
    optimizer = LDAdamW([weight], lr=LR, rank=2)
    start = weight.detach().clone()
    weight.grad = torch.zeros(8, 6)
    for _ in range(2):
        optimizer.step()
    assert torch.equal(weight, start)
    weight.grad = torch.full((8, 6), torch.nan)
    with pytest.raises(RunFailed, match="not finite at step 3"):
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "message"), [({"proj_type": "full"}, "std, reverse_std"), ({"state_bits": 8}, "galore8bit"), ({"rho": 1.0}, r"\[0, 1\)")]
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LDAdamW([weight_of((8, 6))], rank=2, **settings)
