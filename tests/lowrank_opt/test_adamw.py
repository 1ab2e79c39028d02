from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from lm_core.errors import ConfigError, InputError, ResumeRefused
from lowrank_opt import AdamW


def run(optimizer, parameters, gradients):
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def made(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(shapes, steps, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(steps)]


SHAPES = [(17, 9), (5,), (3, 4, 2, 2), (1,), (0, 4)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_adamw(weight_decay):
    ours, theirs = made(SHAPES), made(SHAPES)
    steps = gradients(SHAPES, 50)
    run(AdamW(ours, lr=1e-2, weight_decay=weight_decay), ours, steps)
    run(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=weight_decay), theirs, steps)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_float64_parameters_keep_float64_precision():
    ours, theirs = made(SHAPES, torch.float64), made(SHAPES, torch.float64)
    steps = gradients(SHAPES, 20, torch.float64)
    run(AdamW(ours, lr=1e-2, weight_decay=0), ours, steps)
    run(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0), theirs, steps)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_tensors_that_are_not_contiguous_are_updated_in_place():
    base = torch.randn(6, 4, 3, 3)
    ours = [nn.Parameter(base.t().contiguous().t() if base.ndim == 2 else base.clone(memory_format=torch.channels_last))]
    theirs = [nn.Parameter(base.clone())]
    steps = [[step[0].to(memory_format=torch.channels_last)] for step in gradients([(6, 4, 3, 3)], 5)]
    address = ours[0].data_ptr()
    run(AdamW(ours, lr=1e-2, weight_decay=0), ours, steps)
    run(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0), theirs, steps)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)
    assert ours[0].data_ptr() == address


def test_half_precision_parameters_have_float32_moments_and_arithmetic():
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = made(SHAPES, dtype), [nn.Parameter(p.detach().float()) for p in made(SHAPES, dtype)]
        steps = gradients(SHAPES, 30, dtype)
        optimizer = AdamW(ours, lr=1e-2, stochastic_rounding=False)
        run(optimizer, ours, steps)
        run(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0), theirs, [[g.float() for g in step] for step in steps])
        assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


def test_second_moment_of_bfloat16_weights_follows_a_falling_gradient():
    # in bfloat16 v would stay at its old value: each step changes it by less than half a unit in the last place
    weight = nn.Parameter(torch.zeros(256, dtype=torch.bfloat16))
    optimizer = AdamW([weight], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for sigma in (1.0, 0.1):
        for _ in range(2000):
            weight.grad = (sigma * torch.randn(256, generator=generator)).bfloat16()
            optimizer.step()
    assert optimizer.state[weight]["exp_avg_sq"].mean() <= 0.15


def test_stochastic_rounding_has_no_bias():
    size, start = 1 << 20, 1.0
    weight = nn.Parameter(torch.full((size,), start, dtype=torch.bfloat16))
    weight.grad = torch.ones(size, dtype=torch.bfloat16)
    AdamW([weight], lr=1e-3).step()
    # between 1 - 2^-8 and 1, the neighbours of 1 - 1e-3
    share = 1e-3 * 256
    expected, sigma = start - 1e-3, math.sqrt(share * (1 - share) / size) / 256
    assert abs(weight.detach().double().mean().item() - expected) < 4 * sigma + 1e-8
    assert set(weight.detach().float().unique().tolist()) == {1 - 2**-8, 1.0}


def test_stochastic_rounding_of_negative_values_is_symmetric_and_addressed():
    def after(seed, sign):
        weight = nn.Parameter(torch.full((4096,), sign, dtype=torch.bfloat16))
        weight.grad = torch.full((4096,), sign, dtype=torch.bfloat16)
        AdamW([weight], lr=1e-3, seed=seed).step()
        return weight.detach()

    assert torch.equal(after(0, 1.0), -after(0, -1.0))
    assert torch.equal(after(0, 1.0), after(0, 1.0))
    assert not torch.equal(after(0, 1.0), after(1, 1.0))


def test_state_dict_round_trip_keeps_dtypes_and_shares_nothing():
    parameters = made(SHAPES, torch.bfloat16)
    steps = gradients(SHAPES, 6, torch.bfloat16)
    whole = [nn.Parameter(p.detach().clone()) for p in parameters]
    run(AdamW(whole, lr=1e-2), whole, steps)
    first = AdamW(parameters, lr=1e-2)
    run(first, parameters, steps[:3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = AdamW(parameters, lr=1e-2)
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved)
    run(second, parameters, steps[3:])
    for parameter, reference in zip(parameters, whole, strict=True):
        assert second.state[parameter]["exp_avg"].dtype == torch.float32
        assert torch.equal(parameter, reference)
    assert saved["state"][0]["step"] == 3
    assert saved["state"][0]["exp_avg"].data_ptr() != second.state[parameters[0]]["exp_avg"].data_ptr()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["deepcopy", "pickle"])
def test_a_copy_continues_alike(make):
    parameters = made(SHAPES)
    steps = gradients(SHAPES, 4)
    optimizer = AdamW([{"params": parameters, "names": [str(i) for i in range(5)]}])
    run(optimizer, parameters, steps[:2])
    twin = make(optimizer)
    copies = twin.param_groups[0]["params"]
    run(optimizer, parameters, steps[2:])
    run(twin, copies, steps[2:])
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))


def test_foreign_and_mismatched_states_are_refused_by_name():
    parameters = made([(4, 3)])
    torch_optimizer = torch.optim.AdamW(parameters)
    run(torch_optimizer, parameters, gradients([(4, 3)], 1))
    with pytest.raises(ResumeRefused, match="another optimizer"):
        AdamW(parameters).load_state_dict(torch_optimizer.state_dict())
    ours = AdamW(parameters)
    run(ours, parameters, gradients([(4, 3)], 1))
    with pytest.raises(ResumeRefused, match=r"exp_avg of w has shape \(4, 3\)"):
        AdamW([("w", made([(5, 3)])[0])]).load_state_dict(ours.state_dict())
    with pytest.raises(ResumeRefused, match="1 parameter groups"):
        AdamW([{"params": made([(4, 3)])}, {"params": made([(4, 3)])}]).load_state_dict(ours.state_dict())


def test_behaves_like_a_torch_optimizer():
    model = nn.Linear(3, 2)
    optimizer = AdamW(model.named_parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    inputs = torch.ones(4, 3)

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    schedule.step()
    before = model.weight.detach().clone()
    optimizer.step(closure)
    assert calls == [1, 1]
    assert torch.equal(model.weight, before), "the group's learning rate, now 0, is read at every step"
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_bad_groups_and_gradients_are_refused():
    weight = made([(3, 3)])[0]
    with pytest.raises(ConfigError, match="twice"):
        AdamW([{"params": [weight, weight]}])
    with pytest.raises(ConfigError, match="complex"):
        AdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ConfigError, match="betas"):
        AdamW([weight], betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="lr"):
        AdamW([weight], lr=-1.0)
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="SparseAdam"):
        AdamW(embedding.parameters()).step()


def test_state_bytes_count_two_float32_moments():
    parameters = made([(4, 3), (5,)], torch.bfloat16)
    optimizer = AdamW(parameters)
    run(optimizer, parameters, gradients([(4, 3), (5,)], 1, torch.bfloat16))
    assert optimizer.state_bytes() == 8 * 17
