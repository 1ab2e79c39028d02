"""Splits and routers that look at the model: what they do on known cases, and how much better they are than chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lm_core.errors import ConfigError, InputError
from lm_core.models import load_model
from moe_cpt.calibrate import scale_of
from moe_cpt.convert import convert
from moe_cpt.experts import swiglu
from moe_cpt.inspection import load_mixture
from moe_cpt.router_init import expert_norms, ridge, solved
from moe_cpt.split import split_ffn
from moe_cpt.split.activation import layer_split, mark_rate
from moe_cpt.split.features import read_features, watching, write_features, write_statistics
from moe_cpt.split.random import permutation
from tests.moe_cpt.small import dense_folder, dense_model, tokens


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_neurons_that_fire_together_share_an_expert_and_the_busiest_are_shared() -> None:
    # tokens of four kinds; neuron n fires on kind n % 4, neurons 0..3 on every token and hardest
    kind = torch.arange(400) % 4
    h = (kind[:, None] == torch.arange(20) % 4).float() + 0.01 * draw(400, 20).abs()
    h[:, :4] = 5 + 0.1 * draw(400, 4)
    part = layer_split(h, num_experts=4, num_shared=4, k_act=6, seed=0)
    assert part.shared is not None
    assert part.shared.tolist() == [0, 1, 2, 3]
    assert sorted(sorted(set((expert % 4).tolist())) for expert in part.routed) == [[0], [1], [2], [3]]


def test_mark_rate_counts_the_largest_of_each_token() -> None:
    h = torch.tensor([[3.0, -4, 1, 0], [0, -2, 5, 1], [0, 9, 8, -7]])
    torch.testing.assert_close(mark_rate(h, 2), torch.tensor([1, 3, 2, 0], dtype=torch.float64) / 3, atol=1e-9, rtol=0)


def test_clustering_puts_equal_directions_together() -> None:
    state = dense_model().state_dict()
    directions = draw(4, 32)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for layer in range(2):
        rows = directions[order % 4] * (1 + torch.rand(64, 1)) + 0.01 * draw(64, 32)
        state[f"model.layers.{layer}.mlp.up_proj.weight"] = rows
    for metric in ("l2", "cos"):
        split = split_ffn(state, "clustering", num_experts=4, metric=metric, n_init=3)
        assert all(len(set((order[expert] % 4).tolist())) == 1 for indices in split.indices for expert in indices)
        assert len(split.args["cost"]) == 2


def test_features_on_disk_are_what_the_layers_do(tmp_path: Path) -> None:
    folder, model, rows = tmp_path / "act", dense_model(), [tokens(2, 9), tokens(1, 5)]
    size = write_features(folder, model, rows, ["inputs", "act"])
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    with watching(model, lambda layer, tensors: seen[layer].append(tensors["inputs"])):
        for row in rows:
            model.model(row)
    for layer, block in enumerate(model.model.layers):
        x = torch.cat(seen[layer])
        act = F.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
        assert torch.equal(read_features(folder, layer, "act", 64), act.bfloat16())
        assert torch.equal(read_features(folder, layer, "inputs", 32), x.bfloat16())
    assert size == 2 * 2 * 23 * (32 + 64)
    assert not any(block.mlp._forward_hooks for block in model.model.layers)
    with pytest.raises(InputError, match="holds no gate"):
        read_features(folder, 0, "gate", 64)
    with pytest.raises(InputError, match="has 64 columns, the model 60 neurons"):
        read_features(folder, 0, "act", 60)
    with pytest.raises(InputError, match="is missing; write it with moe-cpt features"):
        read_features(folder, 2, "act", 64)


def test_statistics_are_means_over_the_tokens_that_would_have_been_written(tmp_path: Path) -> None:
    model, rows = dense_model(), [tokens(2, 9), tokens(1, 5)]
    write_features(tmp_path / "all", model, rows, ["act", "inputs"])
    a_RM = read_features(tmp_path / "all", 1, "act", 64).double().numpy()
    expected = {"coactivation": np.einsum("ri,rj->ij", abs(a_RM), abs(a_RM)) / 23, "rate": (a_RM > 0).mean(0), "energy": (a_RM**2).mean(0)}
    for reduce, value in expected.items():
        size = write_statistics(tmp_path / reduce, model, rows, ["act", "inputs"], reduce)
        written = load_file(tmp_path / reduce / "layer_1.safetensors")
        assert np.allclose(written[f"act.{reduce}"].numpy(), value, rtol=0.02, atol=1e-6)
        assert size == 2 * 4 * sum(tensor.numel() for tensor in written.values())
        with pytest.raises(InputError, match="holds no act"):
            read_features(tmp_path / reduce, 1, "act", 64)


def test_ridge_is_the_closed_form_of_its_definition() -> None:
    x, z = draw(50, 6).double(), draw(50, 3, seed=1).double()
    weight = solved(x.T @ x, x.T @ z)
    # the minimum of ||x w - z||^2 + 0.1 mean(x^2) n ||w||^2
    weight.requires_grad_()
    ((x @ weight - z).square().sum() + 0.1 * x.square().mean() * 50 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) < 1e-9


@pytest.mark.parametrize("network", ["linear", "mlp"])
def test_a_ridge_router_prefers_experts_with_large_outputs(network: str, tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    split = split_ffn(source, "random", num_experts=8)
    rows = [tokens(4, 32, seed=seed) for seed in range(4)]
    convert(source, split, tmp_path / "moe", gate_network=network, gate_init="ridge", calibration=rows, num_selects=2)  # type: ignore[arg-type]
    mixture, dense = load_mixture(str(tmp_path / "moe")), load_model(str(source)).train(False)
    norms, chosen = {}, {}

    def watch(layer: int, tensors: dict[str, Tensor]) -> None:
        norms[layer] = expert_norms(tensors["act"], dense.model.layers[layer].mlp.down_proj.weight, list(split.indices[layer]))
        chosen[layer] = mixture.blocks()[layer](tensors["inputs"][None])[1].experts_RK

    with watching(dense, watch):  # type: ignore[arg-type]
        dense.model(rows[0])
    for layer in range(2):
        picked = norms[layer].gather(1, chosen[layer]).mean()
        assert picked > 1.1 * norms[layer].mean()


def test_a_centroid_router_is_the_mean_of_gate_directions(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    split = split_ffn(source, "random", num_experts=8)
    convert(source, split, tmp_path / "moe", gate_network="linear", gate_init="centroid")
    block, gate = load_mixture(str(tmp_path / "moe")).blocks()[1], dense_model().model.layers[1].mlp.gate_proj.weight
    expected = torch.stack([(gate[expert] / gate[expert].norm(dim=1, keepdim=True)).mean(0) for expert in split.indices[1]])
    torch.testing.assert_close(block.router.proj.weight, expected)


def test_a_ridge_router_needs_text(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    with pytest.raises(ConfigError, match="calibration_data: a ridge router is fitted to text"):
        convert(source, split_ffn(source, "random", num_experts=8), tmp_path / "moe", gate_init="ridge")


def random_ffn(hidden: int = 48, width: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    return draw(width, hidden, seed=1) / hidden**0.5, draw(width, hidden, seed=2) / hidden**0.5, draw(hidden, width, seed=3) / width**0.5


@pytest.mark.parametrize(("experts", "selects"), [(16, 4), (16, 2), (8, 2), (16, 8)])
def test_calibrated_factors_tend_to_their_limits_for_random_selection(experts: int, selects: int) -> None:
    gate, up, down = random_ffn()
    x = draw(6000, 48)
    h = swiglu(torch.cat([x @ gate.T, x @ up.T], dim=1))
    parts = permutation(1024, 0, 0).view(experts, -1)
    each_RND = torch.stack([h[:, part] @ down[:, part].T for part in parts], dim=1)
    chosen = torch.rand(6000, experts, generator=torch.Generator().manual_seed(4)).topk(selects).indices
    u = each_RND.gather(1, chosen[:, :, None].expand(-1, -1, 48)).sum(1) / selects
    f = each_RND.sum(1)
    sums = [float((a * b).sum()) for a, b in ((u, u), (u, f), (f, f))]
    for mode, limit in (("lsq", selects), ("rms", (selects * experts) ** 0.5), ("unbiased", experts)):
        assert scale_of(mode, *sums, experts, selects) == pytest.approx(limit, rel=0.05)  # type: ignore[arg-type]


def test_the_whole_router_of_ridge_is_that_of_its_layers(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "dense")
    split, dense = split_ffn(source, "random", num_experts=8), load_model(str(source)).train(False)
    made = convert(source, split, tmp_path / "moe", gate_network="linear")
    rows = [tokens(2, 16)]
    one, two = ridge(made, dense, split, rows), ridge(made, dense, split, [rows[0][:1], rows[0][1:]])
    torch.testing.assert_close(one(1)["proj.weight"], two(1)["proj.weight"], rtol=1e-3, atol=1e-4)
