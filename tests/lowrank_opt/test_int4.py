"""Bases in 4 bits, and Q-GaLore, which is GaLore with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernels_cuda.lowrank import pack_int4 as pack
from kernels_cuda.lowrank import unpack_int4 as unpack
from lm_core.errors import ConfigError
from lowrank_opt import FiraAdamW, GaLoreAdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit
from lowrank_opt.int4 import GROUP, packed_layout


def brute_force(values):
    """Section 10.7 in float64, one group at a time: the nearest of 16 equally spaced levels."""
    flat = values.reshape(-1).numpy().astype(np.float64)
    out = np.empty_like(flat)
    for start in range(0, len(flat), GROUP):
        group = flat[start : start + GROUP]
        zero = np.float64(np.float16(group.min()))
        step = np.float64(np.float16(np.float32(max(0.0, group.max() - zero)) / np.float32(15)))
        levels = zero + step * np.arange(16)
        out[start : start + GROUP] = levels[np.abs(group[:, None] - levels).argmin(axis=1)]
    return torch.tensor(out).view(values.shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (4, 64), (16, 100), (7, 257)])
def test_every_entry_gets_the_nearest_of_sixteen_levels(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 8
    packed = pack(values)
    assert [tuple(part.shape) for part in packed] == list(packed_layout("proj", shape).values())
    assert [part.dtype for part in packed] == [torch.uint8, torch.float16, torch.float16]
    torch.testing.assert_close(unpack(*packed, shape).double(), brute_force(values), rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=600))
def test_no_entry_moves_by_more_than_half_a_step_and_half_precision(numbers):
    values = torch.tensor(numbers)
    found = unpack(*pack(values), values.shape)
    for group, now in zip(values.split(GROUP), found.split(GROUP), strict=True):
        half_step = float(group.max() - group.min()) / 30
        # steps and offsets are rounded to float16, the step's error counting up to 15 times
        assert float((group - now).abs().max()) <= half_step + 2**-10 + 15 * 2**-13


def test_equal_entries_and_zeros_stay():
    for value in (0.0, 0.25, -1.0):
        values = torch.full((3, 100), value)
        assert torch.equal(unpack(*pack(values), (3, 100)), values)


def gradients(shape, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, size, generator=generator) for size in shape)
    small = min(shape)
    for _ in range(steps):
        left, right = (side + 0.05 * torch.randn(side.shape, generator=generator) for side in (left, right))
        yield (torch.linalg.qr(left).Q[:, :small] * 2.0 ** -torch.arange(small)) @ torch.linalg.qr(right).Q[:, :small].t()


def weight_of(shape, dtype=torch.float32):
    return nn.Parameter((0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype))


def train(optimizer, weight, steps):
    for gradient in gradients(tuple(weight.shape), steps):
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("shape", [(18, 7), (7, 18)])
def test_q_galore_is_galore_on_the_levels_of_its_bases(shape):
    """One gap of the class against float64 arithmetic on the basis that `brute_force` leaves."""
    weight = weight_of(shape)
    start, side = weight.detach().double(), "right" if shape[0] > shape[1] else "left"
    optimizer = QGaLoreAdamW8bit([weight], lr=1e-2, rank=3, scale=0.5, weight_decay=0.1, state_bits=32, stagger=False)
    train(optimizer, weight, 5)
    first = next(gradients(shape, 1)).double()
    rows = torch.linalg.svd(first if side == "left" else first.t())[0][:, :3].t()
    rows = rows * rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
    basis, expected, m, v = brute_force(rows.float()), start.clone(), 0.0, 0.0
    for t, gradient in enumerate(gradients(shape, 5), start=1):
        low = basis @ (gradient.double() if side == "left" else gradient.double().t())
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low * low
        back = basis.t() @ ((m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
        expected = (1 - 1e-3) * expected - 5e-3 * (back if side == "left" else back.t())
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "more"), [(QGaLoreAdamW8bit, {"min_8bit_size": 1}), (GaLoreAdamW, {"proj_type": "full"}), (FiraAdamW, {})]
)
def test_resumed_equals_uninterrupted_bit_for_bit(kind, more, dtype):
    settings = {"rank": 3, "update_proj_gap": 3, "proj_dtype": "int4", "moment_transfer": "project", "proj_method": "subspace", **more}
    if kind is FiraAdamW:
        settings["moment_transfer"] = "none"

    def steps(optimizer, weight, first, last):
        for gradient in list(gradients((18, 7), last))[first:]:
            weight.grad = gradient.to(dtype)
            optimizer.step()

    whole, half = weight_of((18, 7), dtype), weight_of((18, 7), dtype)
    steps(kind([whole], lr=1e-2, **settings), whole, 0, 10)
    optimizer = kind([half], lr=1e-2, **settings)
    steps(optimizer, half, 0, 5)
    again = kind([half], lr=1e-2, **settings)
    again.load_state_dict(optimizer.state_dict())
    steps(again, half, 5, 10)
    assert torch.equal(whole, half)
    assert {again.state[half][name].dtype for name in again.state[half] if name.startswith("proj")} == {torch.uint8, torch.float16}


def test_q_galore_stays_near_galore_in_8_bits_and_lengthens_gaps():
    found = {}
    for kind in (GaLoreAdamW8bit, QGaLoreAdamW8bit):
        weight = weight_of((64, 48))
        optimizer = kind([weight], lr=1e-2, rank=8, update_proj_gap=2, **({"adaptive": False} if kind is QGaLoreAdamW8bit else {}))
        train(optimizer, weight, 12)
        found[kind] = weight.detach()
    moved = (found[GaLoreAdamW8bit] - weight_of((64, 48)).detach()).norm()
    assert (found[QGaLoreAdamW8bit] - found[GaLoreAdamW8bit]).norm() < 0.4 * moved
    steady = weight_of((64, 48))
    optimizer = QGaLoreAdamW8bit([steady], rank=8, update_proj_gap=2, adaptive_window=2)
    for _ in range(7):
        steady.grad = next(gradients((64, 48), 1))
        optimizer.step()
    assert optimizer.state[steady]["gap"] == 4


def test_whole_bases_are_needed_where_another_library_is_mirrored():
    with pytest.raises(ConfigError, match="proj_dtype param"):
        GaLoreAdamW([weight_of((8, 6))], rank=2, proj_dtype="int4", compat="galore_torch")
