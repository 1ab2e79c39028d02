"""The other gates, dropped tokens and learned factors, against plain loops in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lm_core.errors import ConfigError
from moe_cpt.export import export, mixtral
from moe_cpt.model import LlamaMoEForCausalLM, MoEBlock
from moe_cpt.options.conversion import ExportConfig
from moe_cpt.plan import parameter_counts
from moe_cpt.routing import balance_loss, fixed_gate, gumbel, switch_gate, within_capacity
from tests.moe_cpt.small import config, mixture_folder, tokens

F64 = torch.float64
GATES: list[dict[str, Any]] = [
    {"gate_type": "SwitchBalancedGate", "num_selects": 1},
    {"gate_type": "UniformPlainGate", "num_selects": 8, "calculator_type": "UniformCalculator"},
    {"gate_type": "UniformLearnableGate", "num_selects": 8},
    {"gate_type": "RandomPlainGate"},
    {"gate_type": "RandomLearnableGate"},
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def made(**changes: Any) -> LlamaMoEForCausalLM:
    torch.manual_seed(0)
    return LlamaMoEForCausalLM(config(**changes))


def outputs(block: MoEBlock, x: torch.Tensor) -> np.ndarray[Any, Any]:
    """Every expert on every token, R x N x D, one at a time."""
    gate_up, down = block.experts.gate_up_proj.detach().numpy(), block.experts.down_proj.detach().numpy()
    rows, found = x.flatten(0, 1).numpy(), []
    for wide, narrow in zip(gate_up, down):
        gate, up = np.split(rows @ wide.T, 2, axis=1)
        found.append(gate / (1 + np.exp(-gate)) * up @ narrow.T)
    return np.stack(found, axis=1)


def softmax(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(np.exp(values) / np.exp(values).sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", GATES, ids=lambda kind: kind["gate_type"])
def test_every_gate_gives_the_sum_it_promises(kind: dict[str, Any]) -> None:
    block = made(gate_network="linear", **kind).double().blocks()[0].eval()
    x = draw(2, 7, 32)
    y, said = block(x, index=torch.tensor([3, 8]))
    logits = x.flatten(0, 1).numpy() @ block.router.proj.weight.detach().numpy().T if block.config.has_router else np.zeros((14, 8))
    expected = np.zeros((14, 32))
    for row, (experts, each) in enumerate(zip(said.experts_RK.tolist(), outputs(block, x))):
        scores = softmax(logits[row])[experts] if kind["gate_type"].startswith("Switch") else softmax(logits[row][experts])
        expected[row] = 4.0 * scores @ each[experts]
    assert_close(y.flatten(0, 1), torch.from_numpy(expected))
    if kind["gate_type"].startswith("Switch"):
        assert said.experts_RK[:, 0].tolist() == logits.argmax(1).tolist()
    if kind["gate_type"].startswith("Uniform"):
        assert all(sorted(row) == list(range(8)) for row in said.experts_RK.tolist())


def test_random_experts_follow_the_sample_and_are_all_equally_likely() -> None:
    block = made(gate_type="RandomPlainGate").blocks()[0]
    x = torch.zeros(40, 50, 32)
    said = block(x, index=torch.arange(40))[1]
    assert all(len(set(row)) == 2 for row in said.experts_RK.tolist())
    # 2000 draws of 2 of 8: 500 each, standard deviation 19
    assert (said.count_N - 500).abs().max() < 90
    assert torch.equal(block(x[:1], index=torch.tensor([7]))[1].experts_RK, said.experts_RK.view(40, 50, 2)[7])


@pytest.mark.parametrize("kind", GATES, ids=lambda kind: kind["gate_type"])
def test_every_weight_that_exists_is_trained_and_counted(kind: dict[str, Any]) -> None:
    model = made(**kind, add_weight_norm=True).train()
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert parameter_counts(model.config.to_dict()).total == sum(parameter.numel() for parameter in model.parameters())
    assert (out.balance_loss.item() > 0) == kind["gate_type"].startswith("Switch")


def test_perturbed_argmax_follows_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]]).expand(20_000, -1)
    said = switch_gate(logits, gumbel_RN=gumbel(3, 0, torch.arange(200), 100, 4))
    assert_close(said.count_N / 20_000, torch.softmax(logits[0], 0), atol=0.015, rtol=0)


def test_balance_of_a_switch_gate_is_smallest_for_equal_shares() -> None:
    probability, count = torch.full((1, 4), 10.0), torch.full((1, 4), 10.0)
    assert balance_loss(probability, count, 0.5, switch=True).item() == pytest.approx(0.5)
    # N * sum of products of shares, written out
    probability, count = torch.tensor([[4.0, 3, 2, 1]]), torch.tensor([[7.0, 1, 1, 1]])
    expected = 4 * (0.4 * 0.7 + 0.3 * 0.1 + 0.2 * 0.1 + 0.1 * 0.1)
    assert balance_loss(probability, count, 1.0, switch=True).item() == pytest.approx(expected)


def test_an_expert_takes_its_capacity_of_real_tokens_in_random_order() -> None:
    logits = torch.tensor([[9.0, 0.0], [9, 0], [9, 0], [9, 0], [0, 9], [9, 0]])
    mask = torch.tensor([1, 1, 1, 1, 1, 0])
    said = switch_gate(logits, mask_R=mask)
    order = torch.tensor([5, 1, 4, 2, 3, 0])
    # 5 real tokens, 2 experts: floor(1.0 * 5 / 2) = 2 of the four that want expert 0 stay, those of the lowest ranks
    after, dropped = within_capacity(said, order, 1.0, mask)
    assert dropped.tolist() == [True, False, True, False, False, False]
    assert after.dropped.item() == 2
    assert (after.score_RK[:, 0] == 0).tolist() == dropped.tolist()
    # never less than one token
    assert within_capacity(said, order, 0.1, mask)[0].dropped.item() == 3


@pytest.mark.parametrize(("gate_type", "padding"), [("SwitchBalancedGate", "zero"), ("TopKBalancedNoisyGate", "input")])
def test_dropped_tokens_are_zero_or_their_input(gate_type: str, padding: str) -> None:
    kind = {"gate_type": gate_type, "num_selects": 1, "calculator_type": "SwitchDropTokenCalculator"}
    model = made(**kind, capacity_factor=0.3, dropped_padding=padding).train()
    block, x = model.blocks()[0], torch.randn(2, 16, 32)
    y, said = block(x)
    dropped = said.score_RK[:, 0] == 0
    assert 0 < said.dropped == dropped.sum()
    lost = x.flatten(0, 1)[dropped] if padding == "input" else torch.zeros(int(dropped.sum()), 32)
    assert torch.equal(y.flatten(0, 1)[dropped], lost)
    assert model(tokens(4)).num_dropped_tokens.shape == (2,)
    assert made(**kind, drop_tokens=False)(tokens(4)).num_dropped_tokens.sum() == 0


def test_scores_without_softmax_or_logits_are_one() -> None:
    keys = draw(5, 6)
    assert fixed_gate(keys, 3, None, softmax=False).score_RK.tolist() == [[1.0] * 3] * 5
    assert_close(fixed_gate(keys, 3, None).score_RK, torch.full((5, 3), 1 / 3, dtype=F64))


def test_a_learned_factor_starts_at_the_configured_one_and_is_folded_on_export() -> None:
    fixed, learned = made(gate_network="linear"), made(gate_network="linear", add_weight_norm=True)
    for block in learned.blocks():
        assert block.score_scale.tolist() == [4.0]
    learned.load_state_dict(fixed.state_dict(), strict=False)
    ids = tokens()
    assert torch.equal(learned.eval()(ids).logits, fixed.eval()(ids).logits)
    torch.nn.init.constant_(learned.blocks()[1].score_scale, 2.5)
    assert_close(mixtral(learned).eval()(ids).logits, learned(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GATES[0], GATES[1], {"add_weight_norm": True}], ids=["switch", "uniform", "learned"])
def test_exported_code_repeats_gates_that_need_no_draws(kind: dict[str, Any], tmp_path: Path) -> None:
    options = {"num_selects": 2, **kind}
    folder = mixture_folder(tmp_path, **options)
    assert export(ExportConfig(model=str(folder), format="llama_moe", save_path=tmp_path / "out"))["difference"] < 1e-4


def test_gates_that_draw_are_not_exported(tmp_path: Path) -> None:
    folder = mixture_folder(tmp_path, num_selects=2, gate_type="RandomPlainGate")
    with pytest.raises(ConfigError, match="has a RandomPlainGate, which no exported code repeats"):
        export(ExportConfig(model=str(folder), format="llama_moe", save_path=tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_type": "SwitchBalancedGate"}, "num_selects: SwitchBalancedGate sends a token to one expert, not to 2; use 1"),
        ({"calculator_type": "UniformCalculator"}, "num_selects: UniformCalculator uses all experts, not 2 of them; use 8"),
        ({"gate_type": "BestGate"}, "gate_type: 'BestGate' is not known"),
    ],
)
def test_gates_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)
