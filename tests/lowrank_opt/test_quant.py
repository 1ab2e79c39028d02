from __future__ import annotations

import copy
import hashlib
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kernels_cuda.lowrank import dequantize_blockwise, quantize_blockwise
from lm_core.errors import ConfigError, ResumeRefused
from lowrank_opt import AdamW, AdamW8bit, GaLoreAdamW, GaLoreAdamW8bit, build_param_groups
from lowrank_opt.quant import code_book

SIGNED, UNSIGNED = code_book(True), code_book(False)


def brute_force(x, code):
    """Nearest code in float64, the lower of two equally near ones: the definition."""
    distance = np.abs(np.asarray(x, np.float64).reshape(-1)[:, None] - code.double().numpy()[None])
    return torch.tensor(distance.argmin(axis=1)).view(np.shape(x))


def test_code_books_are_the_published_ones():
    assert hashlib.sha256(SIGNED.numpy().tobytes()).hexdigest() == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert hashlib.sha256(UNSIGNED.numpy().tobytes()).hexdigest() == "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"


def test_code_books_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    torch.testing.assert_close(functional.create_dynamic_map(signed=True), SIGNED, rtol=0, atol=1e-7)
    torch.testing.assert_close(functional.create_dynamic_map(signed=False), UNSIGNED, rtol=0, atol=1e-7)


def nearest(x, code):
    """Codes of numbers within [-1, 1], in one block whose maximum is 1."""
    codes, absmax = quantize_blockwise(torch.cat([x.view(-1), torch.ones(1)]), code, block=x.numel() + 1)
    assert absmax.tolist() == [1.0]
    return codes[:-1].view(x.shape)


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_every_middle_and_its_neighbours_get_the_nearest_code(code):
    middles = ((code[:-1].double() + code[1:].double()) / 2).float()
    around = [middles, torch.nextafter(middles, torch.tensor(2.0)), torch.nextafter(middles, torch.tensor(-2.0)), code]
    special = torch.tensor([0.0, -0.0, 1.0, 1e-45, 1e-40, 1.1754944e-38, 1e-30, 2.7e-7, 1 - 2**-24])
    values = torch.cat([*around, special, -special] if code is SIGNED else [*around, special])
    assert torch.equal(nearest(values, code).long(), brute_force(values.numpy(), code))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=64))
def test_any_number_gets_the_nearest_code(values):
    x = torch.tensor(values)
    assert torch.equal(nearest(x, SIGNED).long(), brute_force(x.numpy(), SIGNED))
    assert torch.equal(nearest(x.abs(), UNSIGNED).long(), brute_force(x.abs().numpy(), UNSIGNED))


@pytest.mark.parametrize("length", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("row_aligned", [True, False])
def test_blocks_have_their_own_maximum(length, row_aligned):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, length, generator=generator) * torch.rand(3, length, generator=generator).mul(12).exp()
    codes, absmax = quantize_blockwise(x, SIGNED, 256, row_aligned)
    rows = x.numpy() if row_aligned else x.numpy().reshape(1, -1)
    expected_codes, expected_max = [], []
    for row in rows:
        pieces = [row[start : start + 256] for start in range(0, len(row), 256)]
        expected_max.append([np.abs(piece).max() for piece in pieces])
        expected_codes.append(np.concatenate([brute_force(piece / np.abs(piece).max(), SIGNED) for piece in pieces]))
    assert absmax.shape == ((3, math.ceil(length / 256)) if row_aligned else (math.ceil(3 * length / 256),))
    assert torch.equal(absmax.view(-1), torch.tensor(np.array(expected_max)).view(-1))
    assert torch.equal(codes.view(-1).long(), torch.tensor(np.array(expected_codes)).view(-1))
    back = dequantize_blockwise(codes, absmax, SIGNED, 256, row_aligned)
    assert back.shape == x.shape
    relative = (back - x).abs() / torch.tensor(
        np.repeat(np.array(expected_max), [min(256, rows.shape[1] - s) for s in range(0, rows.shape[1], 256)], axis=1)
    ).view(x.shape)
    assert relative.max() < 0.0075


def test_zero_blocks_denormals_empty_tensors_and_nan():
    codes, absmax = quantize_blockwise(torch.zeros(2, 300), SIGNED, 256, True)
    assert absmax.eq(0).all()
    assert SIGNED[codes.long()].eq(0).all()
    assert dequantize_blockwise(codes, absmax, SIGNED, 256, True).eq(0).all()
    tiny = torch.full((4,), 1e-45)
    assert torch.equal(dequantize_blockwise(*quantize_blockwise(tiny, SIGNED), SIGNED), tiny)
    for shape in ((0,), (0, 5), (3, 0)):
        codes, absmax = quantize_blockwise(torch.zeros(shape), SIGNED, row_aligned=len(shape) == 2)
        assert dequantize_blockwise(codes, absmax, SIGNED, row_aligned=len(shape) == 2).shape == shape
    # nobody waits for the device to look for NaN; it shows in the maximum of its block
    assert quantize_blockwise(torch.tensor([1.0, math.nan]), SIGNED)[1].isnan().all()


def test_a_positive_second_moment_never_becomes_zero():
    x = torch.tensor([1.0, 1e-12, 1e-45, 0.0])
    plain = quantize_blockwise(x, UNSIGNED)[0]
    kept = quantize_blockwise(x, UNSIGNED, nonzero=True)[0]
    assert plain.tolist() == [255, 0, 0, 0]
    assert kept.tolist() == [255, 1, 1, 0]


def test_codes_agree_with_bitsandbytes_on_normal_numbers():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    theirs, state = functional.quantize_blockwise(x, code=SIGNED, blocksize=256)
    ours, absmax = quantize_blockwise(x, SIGNED)
    torch.testing.assert_close(state.absmax, absmax)
    assert (theirs.view(-1) != ours.view(-1)).float().mean() <= 0.002


def spectral(shape, power, steps, seed=0):
    """Gradients of random rows whose variance along fixed orthonormal directions falls as k^-2power."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator)).Q
    values = torch.arange(1, shape[1] + 1) ** -power
    for _ in range(steps):
        yield (torch.randn(shape, generator=generator) * values) @ directions.t()


def train(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
def test_8bit_galore_stays_within_3_percent_of_float32_moments(power):
    shape, results = (1024, 512), []
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02
    for kind in (GaLoreAdamW, GaLoreAdamW8bit):
        weight = nn.Parameter(start.clone())
        train(kind([weight], lr=1e-2, rank=128), weight, spectral(shape, power, 50))
        results.append(weight.detach())
    assert (results[1] - results[0]).norm() / (results[0] - start).norm() <= 0.03


def test_8bit_adam_follows_float32_adam_over_many_scales():
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(2 * torch.randn(64, 1024, generator=generator))
    gradients = [scales * torch.randn(scales.shape, generator=generator) for _ in range(100)]
    start, results = torch.randn(scales.shape, generator=generator), []
    for kind in (AdamW, AdamW8bit):
        weight = nn.Parameter(start.clone())
        train(kind([weight], lr=1e-3), weight, gradients)
        results.append(weight.detach())
    assert (results[1] - results[0]).abs().mean() / (results[0] - start).abs().mean() <= 0.30


def test_8bit_adam_is_near_that_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 256, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    gradients = [torch.randn(start.shape, generator=generator) for _ in range(20)]
    train(AdamW8bit([ours], lr=1e-4), ours, gradients)
    train(bnb.optim.AdamW8bit([theirs], lr=1e-4, weight_decay=0.0), theirs, gradients)
    assert (ours - theirs).abs().mean().item() <= 1e-5


@pytest.mark.parametrize("shape", [(256, 8), (64,)])
@pytest.mark.parametrize("smallest", [1, 4096])
def test_tensors_of_zeros_move_at_the_first_step(shape, smallest):
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    AdamW8bit([weight], lr=1e-2, min_8bit_size=smallest).step()
    torch.testing.assert_close(weight.detach(), -1e-2 * weight.grad.sign(), rtol=1e-3, atol=0)


def test_first_step_is_exact_whatever_the_layout():
    # moments start at zero and the update uses them before they are rounded
    for shape in ((300, 70), (70, 300), (16, 256 * 1024 // 16 + 5)):
        start = torch.randn(shape)
        results = []
        for kind in (AdamW, AdamW8bit):
            weight = nn.Parameter(start.clone())
            train(kind([weight], lr=1e-2), weight, [start])
            results.append(weight.detach())
        torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "transfer"), [(AdamW8bit, "none"), (GaLoreAdamW8bit, "none"), (GaLoreAdamW8bit, "project"), (GaLoreAdamW8bit, "reset")]
)
def test_resumed_equals_uninterrupted_bit_for_bit(kind, transfer, dtype):
    keys = {"rank": 16, "update_proj_gap": 3, "moment_transfer": transfer} if kind is GaLoreAdamW8bit else {"rank": None}

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(50, 300), nn.Linear(300, 270)).to(dtype)
        return model, kind(build_param_groups(model, **keys), lr=1e-2)

    def run(model, optimizer, start, end):
        for step in range(start, end):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.step()

    whole, optimizer = build()
    run(whole, optimizer, 0, 8)
    first, optimizer = build()
    run(first, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": copy.deepcopy(optimizer.state_dict())}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = build()
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.state[second[1].weight]["exp_avg_q"].dtype == torch.uint8
    assert "exp_avg" in optimizer.state[second[0].weight], "embeddings keep float32 moments"
    run(second, optimizer, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_other_layouts_are_refused():
    weight = nn.Parameter(torch.randn(64, 80))
    optimizer = AdamW8bit([weight])
    train(optimizer, weight, [torch.randn(64, 80)])
    with pytest.raises(ResumeRefused, match="block_size"):
        AdamW8bit([weight], block_size=128).load_state_dict(optimizer.state_dict())
    with pytest.raises(ResumeRefused, match="AdamW8bit"):
        AdamW([weight]).load_state_dict(optimizer.state_dict())
    with pytest.raises(ConfigError, match="32, 8"):
        AdamW([weight], state_bits=4)
    with pytest.raises(ConfigError, match="compat"):
        GaLoreAdamW8bit([weight], rank=2, compat="galore_torch")
    with pytest.raises(ConfigError, match="whole parameters"):
        AdamW8bit([{"params": [weight], "rank": 4}])
