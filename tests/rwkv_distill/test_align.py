"""Stage 1: the right targets, the right gradients, and a calibration in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_core.method import Batch
from rwkv_distill.align import AlignedLayers, calibration, scale_outputs
from rwkv_distill.losses import misfit
from rwkv_distill.student import StudentModel
from rwkv_distill.student_config import StudentConfig
from tests.rwkv_distill.small import KINDS, student, teacher, tokens


def aligned(kind: str = "llama", recompute: bool = False, **fields: Any) -> AlignedLayers:
    model = student(kind, **fields)
    return AlignedLayers(model, [layer.self_attn for layer in teacher(kind).model.layers], recompute=recompute)


def gradients(layers: AlignedLayers, local: bool, **inputs: Any) -> dict[str, Tensor]:
    ids = tokens(2, 14)
    losses = []
    for _, loss in layers(ids, local=local, **inputs):
        losses.append(loss)
        if local:
            (loss / 7).backward()
    if not local:
        (torch.stack(losses).sum() / 7).backward()
    return {name: p.grad for name, p in layers.named_parameters() if "time_mixer" in name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_targets_are_the_attention_outputs_of_transformers(kind: str, masked: bool) -> None:
    model, ids = teacher(kind), tokens(2, 13)
    mask = torch.ones_like(ids)
    if masked:
        mask[1, 9:] = 0
    seen: list[Tensor] = []
    hooks = [layer.self_attn.register_forward_hook(lambda _m, _i, out: seen.append(out[0])) for layer in model.model.layers]
    model(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    layers = AlignedLayers(StudentModel.from_teacher(model, StudentConfig()), [layer.self_attn for layer in teacher(kind).model.layers])
    for expected, (_, _, target, _) in zip(seen, layers.targets(ids, mask), strict=True):
        torch.testing.assert_close(target[mask == 1], expected[mask == 1], rtol=1e-5, atol=1e-6)


def test_mistral_targets_keep_to_its_window() -> None:
    model = teacher("mistral", sliding_window=4)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
    ids = tokens(1, 13)
    model(input_ids=ids)
    layers = AlignedLayers(
        StudentModel.from_teacher(model), [layer.self_attn for layer in teacher("mistral", sliding_window=4).model.layers]
    )
    for expected, (_, _, target, _) in zip(seen, layers.targets(ids), strict=True):
        torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"preset": "rad"}, {"layers": [1, 2]}, {"rwkv_version": "v6"}], ids=str)
def test_layer_by_layer_gives_the_gradients_of_one_pass(fields: dict[str, Any]) -> None:
    plain, local = gradients(aligned(**fields), local=False), gradients(aligned(**fields), local=True)
    recomputed = gradients(aligned(recompute=True, **fields), local=False)
    assert plain.keys() == local.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(local[name], expected, rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(recomputed[name], expected, rtol=1e-6, atol=1e-8, msg=name)


def test_gradient_through_the_first_value_is_that_of_finite_differences() -> None:
    """The loss of layer 2 depends on the first layer's value projection, and only through its value."""
    layers = aligned()
    weight = layers.student.mixers()[0].value.weight
    ids = tokens(1, 8)

    def loss_of_layer_2() -> Tensor:
        return dict(layers(ids))[2]

    gradient = torch.autograd.grad(loss_of_layer_2(), weight)[0]
    direction = gradient / gradient.norm()
    step = 3e-2
    with torch.no_grad():
        weight.add_(step * direction)
        above = loss_of_layer_2()
        weight.sub_(2 * step * direction)
        below = loss_of_layer_2()
    assert float(gradient.norm()) > 1e-4
    assert float((above - below) / (2 * step)) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_activations_do_not_grow_with_depth() -> None:
    def peak(depth: int, local: bool) -> int:
        model = teacher(num_hidden_layers=depth)
        attentions: list[nn.Module] = [layer.self_attn for layer in teacher(num_hidden_layers=depth).model.layers]
        layers = AlignedLayers(StudentModel.from_teacher(model), attentions)
        held: dict[int, int] = {}
        most = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal most
            storage = tensor.untyped_storage()
            kept = tensor.detach() if tensor.grad_fn is None else tensor
            held[id(kept)] = storage.nbytes()
            most = max(most, sum(held.values()))
            return kept

        def unpack(tensor: Tensor) -> Tensor:
            held.pop(id(tensor), None)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            for _, loss in layers(tokens(2, 40), local=local):
                if local:
                    loss.backward()
        return most

    assert peak(8, local=True) <= 1.3 * peak(2, local=True)
    assert peak(8, local=False) > 2.5 * peak(2, local=False)


@pytest.mark.parametrize("kind", ["l2", "mse", "relative"])
def test_misfit_is_what_its_formula_says(kind: str) -> None:
    torch.manual_seed(0)
    target, output = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    output[1, 3] = torch.nan
    squares = [float(((target[b, t] - output[b, t]).double() ** 2).sum()) for b in range(2) for t in range(5) if real[b, t]]
    energy = sum(float((target[b, t].double() ** 2).sum()) for b in range(2) for t in range(5) if real[b, t])
    expected = {"l2": sum((s / 8) ** 0.5 for s in squares), "mse": sum(squares) / 8, "relative": 7 * sum(squares) / energy}
    assert float(misfit(target, output, real, kind)) == pytest.approx(expected[kind], rel=1e-5)  # type: ignore[arg-type]


def test_calibration_is_the_least_squares_factor() -> None:
    layers = aligned(busy=False)
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[2, 5:] = 0
    # the last row only fills up the batch and counts nothing
    batch = Batch({"input_ids": ids, "attention_mask": mask}, index=torch.tensor([4, -1, 6]), step=0)
    factors = calibration(layers, [batch])

    def squared_errors(scale: float) -> dict[int, float]:
        scale_outputs(layers.student, dict.fromkeys(range(3), scale))
        real = mask * torch.tensor([[1], [0], [1]])
        with torch.no_grad():
            found = {index: float(loss) for index, loss in layers(ids, mask, real=real, kind="mse")}
        scale_outputs(layers.student, dict.fromkeys(range(3), 1 / scale))
        return found

    # a parabola in the factor: its lowest point from three values
    zero, one, two = squared_errors(1e-9), squared_errors(1.0), squared_errors(2.0)
    for index, factor in factors.items():
        curvature = (two[index] - 2 * one[index] + zero[index]) / 2
        slope = one[index] - zero[index] - curvature
        assert factor == pytest.approx(max(1e-3, -slope / (2 * curvature)), rel=1e-3)
    assert max(factors.values()) > 1e-3
