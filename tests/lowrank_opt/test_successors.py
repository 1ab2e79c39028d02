"""APOLLO, Fira and Muon against float64 references and, where they are installed, the published implementations."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lm_core.errors import ConfigError
from lowrank_opt import ApolloAdamW, FiraAdamW, MuonWithAdamW, build_param_groups
from lowrank_opt.apollo import MINI
from lowrank_opt.fira import residual_norms
from lowrank_opt.projector import gaussian

SHAPES = {"tall": (14, 6), "wide": (6, 14)}
GAP, STEPS, LR = 5, 17, 1e-2


def gradients(shape, seed=1):
    """Drifting gradients with a clear order of singular values and a falling size, so that the limiter acts."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, size, generator=generator) for size in shape)
    small = min(shape)
    for step in range(STEPS):
        left, right = (side + 0.05 * torch.randn(side.shape, generator=generator) for side in (left, right))
        directions = torch.linalg.qr(left).Q[:, :small] * 2.0 ** -torch.arange(small), torch.linalg.qr(right).Q[:, :small]
        yield (0.1 + (step % 4)) * (directions[0] @ directions[1].t()) + 0.01 * torch.randn(shape, generator=generator)


def weight_of(shape, dtype=torch.float32):
    return nn.Parameter((0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype))


def train(optimizer, weight, shape):
    for gradient in gradients(shape):
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    return weight.detach().double()


class Reference:
    """Sections 10.5 and 10.6 of the specification in float64, one matrix with phase 0, weight as d x k channels."""

    def __init__(self, weight, rank, decay, *, scale, kind, growth=1.01, random=False):
        self.turned = weight.shape[0] < weight.shape[1]
        w = weight.detach().double().numpy().copy()
        self.w = w.T if self.turned else w
        self.rank, self.decay, self.scale, self.kind, self.growth, self.random = rank, decay, scale, kind, growth, random
        self.time, self.q, self.m, self.v = 0, None, 0.0, 0.0

    def basis(self, g):
        if self.random:
            draw = gaussian(0, 0, self.time // GAP)(self.rank, g.shape[1], torch.device("cpu"))
            return draw.double().numpy() / math.sqrt(self.rank)
        rows = np.linalg.svd(g, full_matrices=False)[2][: self.rank]
        return rows * np.sign(rows[np.arange(self.rank), np.abs(rows).argmax(axis=1)])[:, None]

    def limit(self, u):
        norm = np.linalg.norm(u)
        if self.q is not None and norm > self.growth * self.q:
            u, norm = u * (self.growth * self.q / norm), self.growth * self.q
        self.q = norm
        return u

    def step(self, gradient):
        g = gradient.double().numpy()
        g = g.T if self.turned else g
        if self.time % GAP == 0:
            self.p = self.basis(g)
        self.time += 1
        low = g @ self.p.T
        self.m, self.v = 0.9 * self.m + 0.1 * low, 0.999 * self.v + 0.001 * low**2
        n = self.m / (np.sqrt(self.v) + 1e-8)
        rate = LR * math.sqrt(1 - 0.999**self.time) / (1 - 0.9**self.time)
        sigma = np.linalg.norm(n, axis=1) / (np.linalg.norm(low, axis=1) + 1e-8)
        if self.kind == "fira":
            u = self.scale * n @ self.p + self.limit((g - low @ self.p) * sigma[:, None])
        else:
            if self.kind == "tensor":
                sigma = np.full_like(sigma, np.linalg.norm(n) / (np.linalg.norm(low) + 1e-8))
            u = math.sqrt(self.scale) * self.limit(g * sigma[:, None])
        self.w = (1 - LR * self.decay) * self.w - rate * u

    def result(self):
        return torch.tensor(self.w.T.copy() if self.turned else self.w)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", ["random", "svd"])
@pytest.mark.parametrize(("kind", "scale", "front"), [("channel", 1.0, False), ("tensor", 128.0, False), ("tensor", 4.0, True)])
def test_apollo_equals_a_float64_reference(shape, method, kind, scale, front):
    weight = weight_of(shape)
    reference = Reference(weight, 3, 0.1, scale=scale, kind=kind, random=method == "random")
    settings = {"rank": 3, "update_proj_gap": GAP, "scale": scale, "scale_type": kind, "proj_method": method, "scale_front": front}
    found = train(ApolloAdamW([weight], lr=LR, weight_decay=0.1, **settings), weight, shape)
    for gradient in gradients(shape):
        reference.step(gradient)
    torch.testing.assert_close(found, reference.result(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fira_equals_a_float64_reference(shape):
    weight = weight_of(shape)
    reference = Reference(weight, 3, 0.1, scale=0.5, kind="fira")
    found = train(FiraAdamW([weight], lr=LR, weight_decay=0.1, rank=3, update_proj_gap=GAP, scale=0.5), weight, shape)
    for gradient in gradients(shape):
        reference.step(gradient)
    torch.testing.assert_close(found, reference.result(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_apollo_equals_apollo_torch(shape, kind):
    apollo_torch = pytest.importorskip("apollo_torch", reason="apollo-torch is not installed")
    ours, theirs = weight_of(shape), weight_of(shape)
    settings = {"rank": 3, "update_proj_gap": GAP, "scale": 1.0, "scale_type": kind, "proj_type": "std"}
    reference = apollo_torch.APOLLOAdamW([{"params": [theirs], **settings, "proj": "svd"}], lr=LR, weight_decay=0.1)
    found = train(ApolloAdamW([ours], lr=LR, weight_decay=0.1, proj_method="svd", compat="galore_torch", **settings), ours, shape)
    torch.testing.assert_close(found, train(reference, theirs, shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fira_equals_the_published_one(shape):
    fira = pytest.importorskip("fira", reason="fira is not installed")
    ours, theirs = weight_of(shape), weight_of(shape)
    groups = [{"params": [theirs], "rank": 3, "update_proj_gap": GAP, "alpha": 1.0, "proj_type": "std"}]
    reference = fira.FiraAdamW(groups, lr=LR, weight_decay=0.1, no_deprecation_warning=True)
    settings = {"rank": 3, "update_proj_gap": GAP, "scale": 1.0, "compat": "galore_torch"}
    found = train(FiraAdamW([ours], lr=LR, weight_decay=0.1, **settings), ours, shape)
    torch.testing.assert_close(found, train(reference, theirs, shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_muon_equals_that_of_torch(shape, nesterov, adjust):
    ours, theirs = weight_of(shape), weight_of(shape)
    mine = MuonWithAdamW([ours], lr=LR, weight_decay=0.1, rank=1, nesterov=nesterov, adjust_lr=adjust)
    reference = torch.optim.Muon([theirs], lr=LR, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust)
    torch.testing.assert_close(train(mine, ours, shape), train(reference, theirs, shape), rtol=0, atol=1e-6)


def test_muon_keeps_adamw_for_dense_parameters_and_float32_momentum():
    matrix, bias = weight_of((6, 4), torch.bfloat16), weight_of((4,))
    optimizer = MuonWithAdamW([{"params": [matrix], "rank": 1}, {"params": [bias]}])
    matrix.grad, bias.grad = torch.randn(6, 4).bfloat16(), torch.randn(4)
    optimizer.step()
    assert optimizer.state[matrix]["momentum_buffer"].dtype == torch.float32
    assert set(optimizer.state[bias]) == {"step", "exp_avg", "exp_avg_sq"}


def test_norms_of_the_residual_need_no_residual():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(20, 12, generator=generator)
    for basis in (torch.linalg.qr(torch.randn(12, 4, generator=generator)).Q.t(), torch.randn(4, 12, generator=generator) / 3):
        low = basis @ gradient.t()
        expected = (gradient - low.t() @ basis).norm(dim=1)
        torch.testing.assert_close(residual_norms(gradient.norm(dim=1), low, basis), expected, rtol=1e-4, atol=1e-5)


def test_what_fira_adds_to_galore_is_orthogonal_to_the_basis():
    weight = weight_of((14, 6))
    start = weight.detach().clone()
    optimizer = FiraAdamW([weight], lr=1.0, rank=2, scale=1e-12)
    weight.grad = next(gradients((14, 6)))
    optimizer.step()
    change, basis = weight.detach() - start, optimizer.state[weight]["proj"]
    assert change.norm() > 0.1
    assert (change @ basis.t()).norm() < 1e-4 * change.norm()


def test_updates_grow_slowly_and_recover_from_a_step_without_gradient():
    weight = weight_of((8, 6))
    optimizer = ApolloAdamW([weight], lr=LR, rank=2)
    norms = []
    for size in (1.0, 1.0, 1.0, 0.0, 1.0, 1.0):
        weight.grad = torch.full((8, 6), size)
        optimizer.step()
        norms.append(float(optimizer.state[weight]["prev_norm"]))
    assert norms[1] == pytest.approx(1.01 * norms[0], rel=1e-5)
    assert norms[2] == pytest.approx(1.01 * norms[1], rel=1e-5)
    assert norms[3] == 0
    assert norms[4] > 0


def test_random_projections_are_drawn_anew_and_never_kept():
    weight = weight_of((8, 6))
    optimizer = ApolloAdamW([weight], rank=2, update_proj_gap=3)
    state, drawn = optimizer.state[weight], []
    for _ in range(5):
        weight.grad = torch.randn(8, 6)
        optimizer.step()
        drawn.append(optimizer._random(optimizer.param_groups[0], weight, state))
    assert [torch.equal(a, b) for a, b in itertools.pairwise(drawn)] == [True, True, False, True]
    assert {key for key, value in state.items() if isinstance(value, torch.Tensor)} == {"exp_avg", "exp_avg_sq", "prev_norm"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["apollo", "mini", "svd", "fira", "fira8bit", "muon"])
def test_resumed_equals_uninterrupted_bit_for_bit(kind, dtype):
    keys = {"apollo": {"rank": 3}, "mini": MINI, "svd": {"rank": 3, "proj_method": "svd"}, "fira": {"rank": 3}, "muon": {"rank": 1}}
    keys["fira8bit"] = {"rank": 3, "state_bits": 8, "min_8bit_size": 1, "moment_transfer": "project"}
    make = {"fira": FiraAdamW, "fira8bit": FiraAdamW, "muon": MuonWithAdamW}.get(kind, ApolloAdamW)
    gap = {} if kind == "muon" else {"update_proj_gap": 4}

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 8)).to(dtype)
        return model, make(build_param_groups(model, **keys[kind], **gap), lr=1e-2)

    def run(model, optimizer, start, end):
        for step in range(start, end):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.step()

    whole, optimizer = build()
    run(whole, optimizer, 0, 10)
    first, optimizer = build()
    run(first, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = build()
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(second, optimizer, 4, 10)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("make", [ApolloAdamW, FiraAdamW, MuonWithAdamW])
def test_a_small_problem_is_learnt(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = make(build_param_groups(model, rank=2), lr=1e-2)
    inputs, targets = torch.randn(64, 8), torch.randint(0, 4, (64,))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_settings_that_cannot_work_are_refused():
    for settings, message in (
        ({"proj_type": "full"}, "channels"),
        ({"scale_type": "row"}, "channel, tensor"),
        ({"proj_method": "gram"}, "random, svd"),
        ({"norm_growth": 0.5}, "norm_growth"),
    ):
        with pytest.raises(ConfigError, match=message):
            ApolloAdamW([weight_of((8, 6))], rank=2, **settings)
    with pytest.raises(ConfigError, match="channels"):
        FiraAdamW([weight_of((8, 6))], rank=2, proj_type="full")
    with pytest.raises(ConfigError, match="original"):
        MuonWithAdamW([weight_of((8, 6))], rank=2, adjust_lr="keller")
