from __future__ import annotations

import copy
import inspect
import io
import json
import math
from importlib.resources import files

import numpy as np
import pytest
import torch
from torch import nn

from kernels_cuda import use
from lm_core.errors import ConfigError, InputError, ResumeRefused, RunFailed
from lowrank_opt import GaLoreAdamW, UnsupportedDistributedError, build_param_groups
from lowrank_opt.galore import adapt_gap

SHAPES = {"tall": (18, 7), "wide": (7, 18), "square": (9, 9), "odd": (13, 11)}
PROJ_TYPES = ["std", "reverse_std", "right", "left", "full"]


def stream(shape, steps, seed=1):
    """Gradients with a clear order of singular values, so that bases are well defined, which drift slowly."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(shape[0], shape[0], generator=generator), torch.randn(shape[1], shape[1], generator=generator)
    for _ in range(steps):
        left, right = (side + 0.05 * torch.randn(side.shape, generator=generator) for side in (left, right))
        values = 2.0 ** -torch.arange(min(shape), dtype=torch.float32)
        size = min(shape)
        yield torch.linalg.qr(left).Q[:, :size] * values @ torch.linalg.qr(right).Q[:, :size].t() + 0.001 * torch.randn(
            shape, generator=generator
        )


def train(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient.clone().to(weight.dtype)
        optimizer.step()
        weight.grad = None


def weight_of(shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


class Reference:
    """Section 10.2 of the specification in float64 numpy, one matrix, phase 0."""

    def __init__(self, weight, rank, gap, proj_type, *, lr, scale, decay, transfer="none", betas=(0.9, 0.999), eps=1e-8):
        self.weight = weight.double().numpy().copy()
        self.rank, self.gap, self.lr, self.scale, self.decay, self.transfer = rank, gap, lr, scale, decay, transfer
        self.betas, self.eps = betas, eps
        tall = weight.shape[0] >= weight.shape[1]
        self.side = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}.get(proj_type, proj_type)
        self.time, self.since = 0, 0
        self.left = self.right = None

    @staticmethod
    def signed(rows):
        largest = np.abs(rows).argmax(axis=1)
        return rows * np.sign(rows[np.arange(len(rows)), largest])[:, None]

    def step(self, gradient):
        gradient = gradient.double().numpy()
        self.time += 1
        if (self.time - 1) % self.gap == 0:
            u, _, vt = np.linalg.svd(gradient, full_matrices=False)
            old = self.left, self.right
            self.left, self.right = self.signed(u[:, : self.rank].T), self.signed(vt[: self.rank])
            if self.side == "left":
                self.right = np.eye(gradient.shape[1])
            if self.side == "right":
                self.left = np.eye(gradient.shape[0])
            if old[0] is not None:
                self.move(self.left @ old[0].T, self.right @ old[1].T)
        low = self.left @ gradient @ self.right.T
        if self.time == 1:
            self.m, self.v = np.zeros_like(low), np.zeros_like(low)
        count = self.time - self.since
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * low
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * low**2
        n = (self.m / (1 - self.betas[0] ** count)) / (np.sqrt(self.v / (1 - self.betas[1] ** count)) + self.eps)
        self.weight = (1 - self.lr * self.decay) * self.weight - self.lr * self.scale * self.left.T @ n @ self.right

    def move(self, left, right):
        if self.transfer == "reset":
            self.m, self.v, self.since = 0 * self.m, 0 * self.v, self.time - 1
        if self.transfer == "project":
            one, two = (1 - beta ** (self.time - 1) for beta in self.betas)
            m, v = self.m / one, self.v / two
            moved = left @ m @ right.T
            v = np.abs(left**2 @ (v - m**2) @ (right**2).T + moved**2)
            self.m, self.v = moved * one, v * two


def eps_for(proj_type):
    # both bases of the same gradient make L diagonal: zeros beside it are rounding errors, and must stay below eps
    return 1e-3 if proj_type == "full" else 1e-8


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", ["svd", "gram"])
def test_equals_a_float64_reference(proj_type, shape, method):
    weight = weight_of(shape)
    eps = eps_for(proj_type)
    reference = Reference(weight.detach(), 3, 5, proj_type, lr=1e-2, scale=0.25, decay=0.1, eps=eps)
    settings = {"rank": 3, "update_proj_gap": 5, "proj_type": proj_type, "proj_method": method, "scale": 0.25, "eps": eps}
    train(GaLoreAdamW([weight], lr=1e-2, weight_decay=0.1, **settings), weight, stream(shape, 17))
    for gradient in stream(shape, 17):
        reference.step(gradient)
    torch.testing.assert_close(weight.detach().double(), torch.tensor(reference.weight), rtol=0, atol=2e-4)


@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("transfer", ["project", "reset"])
def test_moments_move_with_the_basis(transfer, proj_type):
    weight = weight_of((12, 8))
    eps = eps_for(proj_type)
    reference = Reference(weight.detach(), 3, 4, proj_type, lr=1e-2, scale=0.5, decay=0.0, transfer=transfer, eps=eps)
    settings = {"eps": eps, "rank": 3, "update_proj_gap": 4, "proj_type": proj_type, "scale": 0.5, "moment_transfer": transfer}
    train(GaLoreAdamW([weight], lr=1e-2, **settings), weight, stream((12, 8), 14))
    for gradient in stream((12, 8), 14):
        reference.step(gradient)
    torch.testing.assert_close(weight.detach().double(), torch.tensor(reference.weight), rtol=0, atol=5e-4)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [3, 100])
def test_compat_equals_galore_torch(proj_type, shape, dtype, rank):
    galore_torch = pytest.importorskip("galore_torch")
    if rank == 100 and proj_type == "reverse_std" and shape[0] < shape[1]:
        pytest.skip("galore_torch projects back from the wrong side here; its formulas are tested below")
    ours, theirs = weight_of(shape, dtype), weight_of(shape, dtype)
    bias, other_bias = nn.Parameter(torch.ones(5, dtype=dtype)), nn.Parameter(torch.ones(5, dtype=dtype))
    settings = {"rank": rank, "update_proj_gap": 5, "scale": 0.25, "proj_type": proj_type}
    mine = GaLoreAdamW([{"params": [ours], **settings}, {"params": [bias]}], lr=1e-2, weight_decay=0.1, compat="galore_torch")
    groups = [{"params": [theirs], **settings}, {"params": [other_bias]}]
    reference = galore_torch.GaLoreAdamW(groups, lr=1e-2, weight_decay=0.1, no_deprecation_warning=True)
    for gradient in stream(shape, 22):
        ours.grad, theirs.grad = gradient.to(dtype), gradient.to(dtype)
        bias.grad = other_bias.grad = gradient.flatten()[:5].to(dtype)
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(bias, other_bias, rtol=0, atol=1e-6)


def test_compat_where_galore_torch_fails():
    # wide, reverse_std, rank >= m: a square rotation on the left side of G^T, projected from the right
    weight = weight_of((4, 9))
    start = weight.detach().double().numpy().copy()
    gradient = next(stream((4, 9), 1))
    train(GaLoreAdamW([weight], lr=1e-2, rank=6, scale=0.5, proj_type="reverse_std", compat="galore_torch"), weight, [gradient])
    g = gradient.double().numpy()
    p = np.linalg.svd(g, full_matrices=False)[2]
    low = g @ p.T
    m, v = 0.1 * low, 0.001 * low**2
    expected = start - 1e-2 * math.sqrt(0.001) / 0.1 * 0.5 * (m / (np.sqrt(v) + 1e-6)) @ p
    torch.testing.assert_close(weight.detach().double(), torch.tensor(expected), rtol=0, atol=1e-5)


def test_rank_that_reaches_the_smaller_side_is_plain_adamw_times_scale():
    ours, theirs = weight_of((6, 9)), weight_of((6, 9))
    train(GaLoreAdamW([ours], lr=1e-2, rank=6, scale=0.5, weight_decay=0.1), ours, stream((6, 9), 50))
    # lr * scale on the update, lr on the decay
    train(torch.optim.AdamW([theirs], lr=5e-3, weight_decay=0.2), theirs, stream((6, 9), 50))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="smaller side"):
        GaLoreAdamW([weight_of((6, 9))], rank=6, full_rank_policy="error")


def test_full_rank_policy_rotate_keeps_a_square_basis():
    weight = weight_of((6, 9))
    optimizer = GaLoreAdamW([weight], rank=64, full_rank_policy="rotate")
    train(optimizer, weight, stream((6, 9), 2))
    basis = optimizer.state[weight]["proj"]
    torch.testing.assert_close(basis @ basis.t(), torch.eye(6), rtol=0, atol=1e-5)


def test_refreshes_take_turns():
    weights = [nn.Parameter(torch.randn(8, 6)) for _ in range(4)]
    optimizer = GaLoreAdamW(weights, rank=2, update_proj_gap=8)
    refreshed = []
    for _ in range(18):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        before = [optimizer.state[w].get("refreshes", 0) for w in weights]
        optimizer.step()
        refreshed.append([optimizer.state[w]["refreshes"] - b for w, b in zip(weights, before, strict=True)])
    assert refreshed[0] == [1, 1, 1, 1]
    assert [step + 1 for step, who in enumerate(refreshed) if who[0]] == [1, 9, 17]
    assert [step + 1 for step, who in enumerate(refreshed) if who[1]] == [1, 3, 11]
    assert [step + 1 for step, who in enumerate(refreshed) if who[3]] == [1, 7, 15]
    assert all(sum(who) <= 1 for who in refreshed[1:])


def test_a_steady_basis_is_refreshed_less_often():
    weight = weight_of((8, 6))
    settings = {"rank": 2, "update_proj_gap": 2, "adaptive": True, "adaptive_window": 2, "max_gap": 6}
    optimizer = GaLoreAdamW([weight], **settings)
    gradient = next(stream((8, 6), 1))
    gaps = []
    for _ in range(24):
        train(optimizer, weight, [gradient])
        gaps.append(optimizer.state[weight]["gap"])
    # refreshes at 1, 3, 5: two overlaps are held, the gap doubles; at 9 and 13 again, up to max_gap
    assert gaps[:4] == [2] * 4
    assert gaps[4:12] == [4] * 8
    assert gaps[12:] == [6] * 12
    group, state = {**optimizer.param_groups[0], "max_gap": None}, {"gap": 2, "overlaps": [0.0]}
    adapt_gap(group, state, torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert state["overlaps"] == [0.0, 0.0]
    assert state["gap"] == 2


def test_a_zero_gradient_waits_for_the_next_one():
    weight = weight_of((8, 6))
    optimizer = GaLoreAdamW([weight], rank=2, update_proj_gap=10, lr=0.1)
    start = weight.detach().clone()
    train(optimizer, weight, [torch.zeros(8, 6)])
    assert torch.equal(weight, start)
    assert torch.equal(optimizer.state[weight]["proj"], torch.eye(2, 6))
    train(optimizer, weight, stream((8, 6), 1))
    assert optimizer.state[weight]["refreshes"] == 1
    assert optimizer.state[weight]["next_refresh"] == 12


def test_a_non_finite_gradient_never_becomes_a_basis():
    optimizer = GaLoreAdamW([("layer.weight", weight_of((8, 6)))], rank=2)
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.full((8, 6), float("nan"))
    with pytest.raises(RunFailed, match=r"layer\.weight.*step 1"):
        optimizer.step()


def test_bfloat16_weights_move_as_float32_ones():
    shape = (40, 24)
    half, full = weight_of(shape, torch.bfloat16), nn.Parameter(weight_of(shape, torch.bfloat16).detach().float())
    optimizer = GaLoreAdamW([half], lr=1e-2, rank=4, scale=1.0, weight_decay=0.1)
    start = full.detach().clone()
    train(optimizer, half, stream(shape, 40))
    train(GaLoreAdamW([full], lr=1e-2, rank=4, scale=1.0, weight_decay=0.1), full, [g.bfloat16().float() for g in stream(shape, 40)])
    state = optimizer.state[half]
    assert (state["exp_avg"].dtype, state["proj"].dtype) == (torch.float32, torch.bfloat16)
    moved, error = (full - start).norm(), (half.float() - full).norm()
    assert error < 0.15 * moved


@pytest.mark.parametrize("proj_dtype", ["fp32", "bf16"])
def test_dtype_of_the_basis_can_differ_from_the_weight(proj_dtype):
    weight, plain = weight_of((20, 12)), weight_of((20, 12))
    optimizer = GaLoreAdamW([weight], lr=1e-2, rank=3, proj_dtype=proj_dtype)
    train(optimizer, weight, stream((20, 12), 5))
    train(GaLoreAdamW([plain], lr=1e-2, rank=3), plain, stream((20, 12), 5))
    assert optimizer.state[weight]["proj"].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[proj_dtype]
    torch.testing.assert_close(weight, plain, rtol=0, atol=1e-3)


# between two fresh bases L is diagonal but for rounding errors, which Adam then normalises in either precision
@pytest.mark.parametrize(("proj_type", "bound"), [("right", 0.02), ("left", 0.02), ("full", 0.15)])
def test_products_in_bfloat16_follow_those_in_float32(proj_type, bound):
    shape = (40, 24)
    half, full = weight_of(shape), weight_of(shape)
    start = full.detach().clone()
    for weight, proj_dtype in ((half, "bf16"), (full, "param")):
        train(
            GaLoreAdamW([weight], lr=1e-2, rank=4, proj_type=proj_type, proj_dtype=proj_dtype, proj_method="gram"),
            weight,
            stream(shape, 20),
        )
    moved, error = (full - start).norm(), (half - full).norm()
    assert 0 < error < bound * moved


def test_small_updates_of_bfloat16_weights_are_not_lost():
    weight = nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16))
    optimizer = GaLoreAdamW([weight], lr=1e-3, rank=1, scale=1.0)
    gradient = torch.ones(64, 64)
    train(optimizer, weight, [gradient] * 50)
    # N is a row of +-1 of length d, spread over k entries by a unit vector: each step is lr / sqrt(k)
    expected = 1.0 - 50 * 1e-3 / 8
    assert abs(weight.detach().double().mean().item() - expected) < 1e-3


def constant_step(share, seed=0, before=0, steps=1, rounding=True, shape=(1024, 1024)):
    """Ones minus `share` of a step of bfloat16 everywhere, `steps` times, by the matrix that has `before` others before it."""
    weights = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for _ in range(before + 1)]
    # N is a row of ones, spread over k entries by a unit vector; steps below 1 are 2^-8
    lr = share * 2**-8 * math.sqrt(min(shape))
    optimizer = GaLoreAdamW(weights, lr=lr, rank=1, scale=1.0, seed=seed, stochastic_rounding=rounding)
    train(optimizer, weights[-1], [torch.ones(shape)] * steps)
    return weights[-1].detach().float()


def test_stochastic_rounding_of_matrices_has_no_bias():
    share = 0.3
    moved = constant_step(share)
    assert set(moved.unique().tolist()) == {1 - 2**-8, 1.0}
    down = (moved < 1).double()
    assert abs(down.mean().item() - share) < 4 * math.sqrt(share * (1 - share) / down.numel()) + 1e-5
    # neighbours in a row and in a column are rounded independently of each other
    for one, other in ((down[:, :-1], down[:, 1:]), (down[:-1], down[1:])):
        correlation = ((one - share) * (other - share)).mean().item() / (share * (1 - share))
        assert abs(correlation) < 4 / math.sqrt(one.numel())
    assert torch.equal(constant_step(share, rounding=False), torch.ones(1024, 1024))


def test_stochastic_rounding_of_matrices_is_addressed():
    def small(**address):
        return constant_step(0.3, shape=(64, 64), **address)

    assert torch.equal(small(), small())
    for other in (small(seed=1), small(before=1), 1 + small(steps=2) - small()):
        assert (small() != other).float().mean() > 0.2


@pytest.mark.parametrize("proj_dtype", ["param", "fp32"])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("rounding", [True, False])
def test_bfloat16_weights_are_those_of_the_reference_operators(proj_type, proj_dtype, rounding):
    def after(kernels):
        weight = weight_of((64, 48), torch.bfloat16)
        settings = {"rank": 8, "proj_type": proj_type, "proj_dtype": proj_dtype, "stochastic_rounding": rounding}
        optimizer = GaLoreAdamW([weight], lr=1e-2, scale=1.0, weight_decay=0.1, eps=eps_for(proj_type), **settings)
        before = use(kernels)
        try:
            train(optimizer, weight, stream((64, 48), 1))
        finally:
            use(before)
        return weight.detach().float()

    ours, reference = after("cpu"), after("reference")
    # the same words, but products rounded to bfloat16 and not: a change differs by 2^-8 of itself, and few weights by a step
    torch.testing.assert_close(ours, reference, rtol=2**-7, atol=1e-4)
    assert (ours != reference).float().mean() < 0.03


def test_convolutions_are_matrices_of_output_channels():
    weight, flat = weight_of((8, 3, 2, 2)), weight_of((8, 3, 2, 2))
    flat = nn.Parameter(flat.detach().view(8, 12))
    channels_last = nn.Parameter(weight.detach().to(memory_format=torch.channels_last))
    gradients = list(stream((8, 12), 7))
    train(GaLoreAdamW([weight], lr=1e-2, rank=2), weight, [g.view(8, 3, 2, 2) for g in gradients])
    train(GaLoreAdamW([channels_last], lr=1e-2, rank=2), channels_last, [g.view(8, 3, 2, 2) for g in gradients])
    train(GaLoreAdamW([flat], lr=1e-2, rank=2), flat, gradients)
    assert torch.equal(weight.view(8, 12), flat)
    torch.testing.assert_close(channels_last, weight)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_left_alone_and_parameters_get_no_attributes():
    weight = weight_of((8, 6))
    before = set(vars(weight))
    weight.grad = gradient = torch.randn(8, 6)
    copied = gradient.clone()
    GaLoreAdamW([weight], rank=2).step()
    assert weight.grad is gradient
    assert torch.equal(gradient, copied)
    assert set(vars(weight)) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [3, 5, 6])
@pytest.mark.parametrize(
    "settings",
    [{}, {"proj_method": "rsvd", "moment_transfer": "project"}, {"proj_type": "full", "adaptive": True}, {"compat": "galore_torch"}],
)
def test_resumed_equals_uninterrupted_bit_for_bit(settings, stop, dtype):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 9), nn.Linear(9, 4)).to(dtype)
        groups = build_param_groups(model, rank=2, update_proj_gap=5, exclude_modules=["2.weight"], **settings)
        return model, GaLoreAdamW(groups, lr=1e-2, seed=3, compat=settings.get("compat", "none"))

    def run(model, optimizer, start, end):
        for step in range(start, end):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.step()

    whole, optimizer = build()
    run(whole, optimizer, 0, 14)
    first, optimizer = build()
    run(first, optimizer, 0, stop)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = build()
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(second, optimizer, stop, 14)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("key", "value"), [("rank", 3), ("proj_type", "left"), ("proj_dtype", "fp32")])
def test_state_of_other_settings_is_refused(key, value):
    weight = weight_of((8, 6))
    optimizer = GaLoreAdamW([weight], rank=2)
    train(optimizer, weight, stream((8, 6), 1))
    with pytest.raises(ResumeRefused, match=key):
        GaLoreAdamW([weight], **{"rank": 2, key: value}).load_state_dict(optimizer.state_dict())


def test_refresh_set_basis_and_stats():
    weight = weight_of((8, 6))
    optimizer = GaLoreAdamW([("w", weight)], rank=2, update_proj_gap=4)
    gradients = list(stream((8, 6), 12))
    train(optimizer, weight, gradients[:2])
    weight.grad = gradients[2]
    optimizer.refresh()
    assert optimizer.state[weight]["refreshes"] == 2
    assert (optimizer.state[weight]["step"], optimizer.state[weight]["next_refresh"]) == (2, 7)
    stats = optimizer.stats()["w"]
    best = torch.linalg.svdvals(gradients[2]).square()
    assert stats["energy"] == pytest.approx(float(best[:2].sum() / best.sum()), rel=1e-4)
    optimizer.step()
    assert optimizer.stats()["w"]["age"] == 0
    optimizer.refresh(now=False)
    assert optimizer.state[weight]["next_refresh"] == 4
    basis = torch.linalg.qr(torch.randn(6, 2)).Q.t()
    optimizer.set_basis(weight, basis)
    train(optimizer, weight, gradients[3:4])
    assert torch.equal(optimizer.state[weight]["proj"], basis)
    with pytest.raises(InputError, match=r"\(2, 6\)"):
        optimizer.set_basis(weight, torch.randn(3, 6))


def test_state_bytes_are_moments_and_bases():
    weights = [weight_of((20, 12), torch.bfloat16), weight_of((12, 20), torch.bfloat16), nn.Parameter(torch.randn(5))]
    optimizer = GaLoreAdamW([{"params": weights[:2], "rank": 3}, {"params": weights[2:]}])
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert optimizer.state_bytes() == 2 * (8 * 3 * 20 + 2 * 3 * 12) + 8 * 5


def test_flat_parameters_in_a_group_with_rank_are_refused():
    weight = nn.Parameter(torch.randn(9))
    optimizer = GaLoreAdamW([("w", weight)], rank=2)
    weight.grad = torch.randn(9)
    with pytest.raises(UnsupportedDistributedError, match="w is 1-dimensional"):
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -1}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": 2, "update_proj_gap": 0}, "update_proj_gap"),
        ({"rank": 2, "scale": 0.0}, "scale"),
        ({"proj_type": "rigth"}, "did you mean right"),
        ({"proj_method": "lanczos"}, "svd, gram"),
        ({"moment_transfer": "keep"}, "none, project, reset"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GaLoreAdamW([weight_of((8, 6))], **settings)


def test_a_learning_rate_may_be_a_tensor():
    weights = [weight_of((8, 6)), weight_of((8, 6))]
    for weight, lr in zip(weights, (0.5, torch.tensor(0.5)), strict=True):
        train(GaLoreAdamW([weight], rank=2, lr=lr, weight_decay=0.1), weight, stream((8, 6), 3))
    assert torch.equal(*weights)


def test_an_overflow_of_the_gradient_scaler_changes_nothing():
    weight = weight_of((8, 6))
    optimizer = GaLoreAdamW([weight], rank=2, lr=1e-2)
    train(optimizer, weight, stream((8, 6), 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before, saved = weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    scaler.scale(weight.sum()).backward()
    weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, before)
    assert all(
        torch.equal(value, saved["state"][0][key]) if isinstance(value, torch.Tensor) else value == saved["state"][0][key]
        for key, value in optimizer.state_dict()["state"][0].items()
    )
    assert scaler.get_scale() == 2.0


def test_memory_of_a_step_stays_below_one_matrix():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            for tensor in result if isinstance(result, list | tuple) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                    self.elements = max(self.elements, tensor.numel())
            return result

    weight = nn.Parameter(torch.randn(640, 512))
    optimizer = GaLoreAdamW([weight], rank=64, weight_decay=0.1)
    weight.grad = torch.randn(640, 512)
    optimizer.step()
    with Largest() as largest:
        optimizer.step()
    assert largest.elements <= 64 * 640


def test_the_packaged_settings_are_the_defaults_of_the_optimizer():
    file = files("lowrank_opt") / "defaults" / "galore_config.json"
    shipped = json.loads(file.read_text())
    arguments = inspect.signature(GaLoreAdamW).parameters
    assert {key: value for key, value in shipped.items() if key in arguments and arguments[key].default != value} == {
        "rank": 128,
        # not given: the class decides
        "adaptive": None,
        "proj_dtype": None,
    }
    assert set(shipped) - set(arguments) == {
        "target_modules",
        "exclude_modules",
        "embedding_state_bits",
        "weight_dtype",
        "apollo",
        "ldadam",
    }
