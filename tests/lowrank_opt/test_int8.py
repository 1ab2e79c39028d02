"""Weights in 8 bits: codes, layers, their updates by Q-GaLore, and runs with them."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.lowrank_opt.test_method import LowRankConformance
from torch import nn

from lm_core.config import build
from lm_core.errors import ConfigError
from lowrank_opt import AdamW, GaLoreAdamW8bit, QGaLoreAdamW8bit, attach_per_layer, build_param_groups, estimate_memory
from lowrank_opt.base import Rounding
from lowrank_opt.config import TrainConfig
from lowrank_opt.estimation import one
from lowrank_opt.int8 import GROUP, Int8Linear, dequantised, quantise, to_dense, to_int8, weight_bytes
from lowrank_opt.method import LowRank

CPU = torch.device("cpu")


def rounding(step: int) -> Rounding:
    return Rounding(lambda: Rounding.draw_tile(0, step, CPU), 0, 3, step)


def packed(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = -(-values.numel() // GROUP)
    parts = torch.zeros(values.shape, dtype=torch.uint8), torch.zeros(groups).half(), torch.zeros(groups).half()
    quantise(values, *parts, None)
    return parts


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=600))
def test_every_entry_gets_the_nearest_of_256_levels_around_its_group(numbers: list[float]) -> None:
    values = torch.tensor(numbers)
    codes, scale, zero = packed(values)
    found = dequantised(codes, scale, zero, torch.float32)
    for number, group in enumerate(values.split(GROUP)):
        step, span = float(scale[number]), float(group.max() - group.min())
        levels = float(zero[number]) + step * torch.arange(256, dtype=torch.float64)
        nearest = (group.double()[:, None] - levels).abs().amin(dim=1)
        now = found.split(GROUP)[number].double()
        # of two levels that are equally near, float32 may take the other
        torch.testing.assert_close((now - group).abs(), nearest, rtol=0, atol=1e-5)
        assert float((now - group).abs().max()) <= step / 2 + 1e-5
        # a range with its margins, in float16
        reach = span * (1 + 2 / 32) + 2**-9 * float(group.abs().max())
        assert step <= reach / 255 * (1 + 2**-9) + 2**-23


def test_rounding_at_random_has_no_bias_and_moves_to_neighbours_only() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(10, 120, generator=generator)
    codes, scale, zero = packed(start)
    old = scale.clone(), zero.clone()
    # inside the grid, so it stays
    values = 0.97 * start
    draws = 2000
    total = torch.zeros(start.shape, dtype=torch.float64)
    for step in range(draws):
        quantise(values, codes, scale, zero, rounding(step))
        total += dequantised(codes, scale, zero, torch.float32)
    assert torch.equal(old[0], scale)
    assert torch.equal(old[1], zero)
    steps = scale.double().repeat_interleave(GROUP)[: start.numel()].view(start.shape)
    places = (values.double() - zero.double().repeat_interleave(GROUP)[: start.numel()].view(start.shape)) / steps
    chance = places - places.floor()
    off = total / draws - values
    spread = steps * (chance * (1 - chance) / draws).sqrt()
    assert float(off.sum().abs()) < 4 * float(spread.square().sum().sqrt())
    # the largest of 1200
    assert bool((off.abs() < 5 * spread + 1e-4 * steps).all())
    assert float((dequantised(codes, scale, zero, torch.float32) - values).abs().div(steps).max()) < 1


def test_entries_that_do_not_change_keep_their_codes_whatever_is_drawn() -> None:
    codes, scale, zero = packed(torch.randn(7, 300, generator=torch.Generator().manual_seed(1)))
    before = codes.clone()
    moved = dequantised(codes, scale, zero, torch.float32)
    moved[3, 5] += float(scale[0]) / 3
    for step in range(20):
        quantise(moved, codes, scale, zero, rounding(step))
    different = (codes != before).view(-1).nonzero().view(-1).tolist()
    assert set(different) <= {3 * 300 + 5}


def test_a_group_that_leaves_its_grid_or_shrinks_gets_another() -> None:
    values = torch.randn(2, 256, generator=torch.Generator().manual_seed(2))
    codes, scale, zero = packed(values)
    old = scale.clone()
    values[0] *= 3
    values[1] /= 10
    quantise(values, codes, scale, zero, None)
    assert float(scale[0]) == pytest.approx(3 * float(old[0]), rel=1e-2)
    assert float(scale[1]) == pytest.approx(float(old[1]) / 10, rel=1e-2)
    assert bool(((dequantised(codes, scale, zero, torch.float32) - values).abs().amax(dim=1) <= 0.51 * scale.float()).all())
    zeros = packed(torch.zeros(3, 100))
    assert not bool(dequantised(*zeros, torch.float32).any())


def two_layers(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A model with weights in 8 bits, and an ordinary one with the weights that these stand for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 48, bias=False)).to(dtype)
    to_int8(model, ["0.weight", "2.weight"])
    plain = copy.deepcopy(model)
    to_dense(plain)
    return model, plain


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_a_layer_gives_what_its_whole_weight_would(mode: str) -> None:
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    models = two_layers(dtype)
    inputs = [torch.randn(3, 5, 64, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in models]
    for model, x in zip(models, inputs, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            out = model(x).float()
        out.square().sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5} if mode == "fp32" else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **close)
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert ours.shape == theirs.shape
        assert ours.grad is not None
        assert ours.grad.dtype == dtype
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, **close, msg=name)


def trained(model: nn.Module, steps: int, layers: bool = False, kind: Any = QGaLoreAdamW8bit, **more: Any) -> Any:
    optimizer = kind(build_param_groups(model, rank=8, update_proj_gap=4), lr=1e-2, weight_decay=0.1, **more)
    if layers:
        attach_per_layer(optimizer, model)
    for step in range(steps):
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_an_update_is_that_of_the_whole_weight_rounded_to_codes() -> None:
    model, plain = two_layers()
    trained(model, 1, stochastic_rounding=False)
    trained(plain, 1)
    for place in (0, 2):
        layer: Any = model[place]  # type: ignore[index]
        whole = plain[place].weight.detach()  # type: ignore[index]
        steps = layer.weight_scale.float().repeat_interleave(GROUP)[: whole.numel()].view(whole.shape)
        assert float(((layer.dense(torch.float32) - whole).abs() / steps).max()) <= 0.501
        assert not torch.equal(layer.dense(torch.float32), two_layers()[0][place].dense(torch.float32))  # type: ignore[index]


def test_updates_are_the_same_again_and_inside_backward() -> None:
    found = []
    for layers in (False, False, True):
        model, _ = two_layers()
        trained(model, 6, layers=layers)
        found.append(model.state_dict())
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])
    model, _ = two_layers()
    trained(model, 6, seed=1)
    assert not torch.equal(model.state_dict()["0.weight_q"], found[0]["0.weight_q"])


def test_a_teacher_is_learned_as_with_whole_weights() -> None:
    torch.manual_seed(5)
    teacher = nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 48, bias=False)).requires_grad_(False)
    found = []
    for model in two_layers():
        optimizer = QGaLoreAdamW8bit(build_param_groups(model, rank=8, update_proj_gap=10, scale=1.0), lr=3e-3)
        losses = []
        for step in range(300):
            x = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - teacher(x)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    (ours, plain) = (sum(losses[-20:]) / 20 for losses in found)
    assert plain < found[1][0] / 5
    assert ours == pytest.approx(plain, rel=0.03)


def test_no_weight_is_kept_whole_and_copies_stand_alone() -> None:
    model, _ = two_layers()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    placeholders = 2 * 4
    assert sum(held.values()) == weight_bytes(64 * 100) + weight_bytes(100 * 48) + 4 * 100 + placeholders
    assert weight_bytes(64 * 100) == 64 * 100 + 4 * 25
    other = copy.deepcopy(model)
    before = model.state_dict()["0.weight_q"].clone()
    trained(other, 2)
    assert torch.equal(model.state_dict()["0.weight_q"], before)
    assert not torch.equal(other.state_dict()["0.weight_q"], before)
    fresh, _ = two_layers()
    fresh.load_state_dict(other.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(fresh(x), other(x))


def test_what_cannot_work_is_refused_by_name() -> None:
    model, _ = two_layers()
    for kind in (AdamW, GaLoreAdamW8bit):
        with pytest.raises(ConfigError, match=f"{kind.__name__} cannot update weights in 8 bits"):
            kind(model.parameters())
    with pytest.raises(ConfigError, match=r"2 weights in 8 bits.*have no rank"):
        QGaLoreAdamW8bit(build_param_groups(model, rank=64))
    tied = nn.ModuleList([nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)])
    tied[1].weight = tied[0].weight  # type: ignore[assignment]
    for name in ("0.weight", "1.weight"):
        with pytest.raises(ConfigError, match=f"weight_dtype: {name} is no weight of a linear layer alone"):
            to_int8(tied, [name])
    values = {"mode": "pretraining", "model": "llama_test", "precision": "bf16", "galore": {"weight_dtype": "int8"}}
    for engine in ({"engine": "sharded", "galore": {"weight_dtype": "int8", "proj_type": "right"}}, {"num_processes": 2}):
        with pytest.raises(ConfigError, match=r"galore\.weight_dtype: int8 weights are updated in one process, not (engine: sharded|2)"):
            build(TrainConfig, {**values, "optimizer": "qgalore", **engine})
    with pytest.raises(ConfigError, match=r"weight_dtype: .*h\.0\.attn\.c_attn\.weight is no weight of a linear layer alone \(Conv1D\)"):
        LowRank(
            build(TrainConfig, {**values, "optimizer": "qgalore", "model": "gpt2_test", "galore": {"weight_dtype": "int8", "rank": 8}})
        ).build()


OPTIONS: dict[str, Any] = {"precision": "bf16", "per_layer": True, "galore": {"weight_dtype": "int8", "rank": 8, "update_proj_gap": 3}}


def suite() -> LowRankConformance:
    made = LowRankConformance()
    made.optimizer = "qgalore"
    return made


def test_the_estimate_gives_the_bytes_of_weights_and_states() -> None:
    config = suite().options(**OPTIONS)
    method = suite().method(config)
    model = method.build()
    layers = [part for part in model.modules() if isinstance(part, Int8Linear)]
    assert len(layers) == 14
    memory = one(config)
    codes = sum(weight_bytes(layer.weight.numel()) for layer in layers)
    whole = sum(p.nbytes for p in model.parameters() if p.untyped_storage().nbytes() == p.nbytes)
    assert memory.weights == codes + whole
    held = sum(b.nbytes for layer in layers for b in layer.buffers())
    assert held == codes
    plain = estimate_memory("llama_test", "qgalore", rank=8, dtype=torch.bfloat16, per_layer=True)
    assert memory.weights == plain.weights - sum(2 * layer.weight.numel() for layer in layers) + codes
    assert (memory.states, memory.gradients) == (plain.states, plain.gradients)


@pytest.mark.slow
def test_runs_resume_bit_for_bit_and_end_in_an_ordinary_model(tmp_path: Path) -> None:
    options = {**OPTIONS, "save_every": "3"}
    result = suite().run(tmp_path / "whole", budget="6 steps", **options)
    assert result["memory"]["predicted_peak_bytes"] > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints/checkpoint-6")
    suite().run(tmp_path / "part", budget="6 steps", resume="auto", **options)
    for file in ("checkpoints/checkpoint-6/model.safetensors", "checkpoints/checkpoint-6/optimizer.safetensors", "final/model.safetensors"):
        first, second = (load_file(tmp_path / name / file) for name in ("whole", "part"))
        assert all(torch.equal(first[name], second[name]) for name in first), file
    kept = load_file(tmp_path / "part/checkpoints/checkpoint-6/model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    whole = dequantised(*(kept[name + part] for part in ("_q", "_scale", "_zero")), torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "part/final/model.safetensors")[name], whole)
