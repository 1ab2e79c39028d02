"""Optimizer state as tensors and JSON, and tied weights in safetensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_core.engine import state
from lm_core.errors import InputError, ResumeRefused


class Codes(torch.optim.Optimizer):
    """State of every kind a checkpoint must keep: uint8 codes, float32 moments of bfloat16 weights, numbers, strings, lists."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "codes": torch.arange(p.numel(), dtype=torch.uint8),
                    "moment": torch.full_like(p, 1 / 3, dtype=torch.float32),
                    "step": 7,
                    "side": "right",
                    "overlaps": [0.1, None],
                    "quantised": {"inner": torch.ones(3, dtype=torch.uint8), "block": 256},
                }


def bf16_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).bfloat16()


def names(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def test_every_state_comes_back_in_its_own_dtype(tmp_path: Path) -> None:
    model = bf16_model()
    optimizer = Codes(model.parameters())
    optimizer.step()
    tensors, info = state.optimizer_tensors(optimizer, names(model))
    assert set(tensors) == {f"{name}/{key}" for name in names(model) for key in ("codes", "moment", "quantised/inner")}
    state.write_tensors(tmp_path / "o.safetensors", tensors)
    info = json.loads(json.dumps(info))

    fresh = Codes(model.parameters())
    state.load_optimizer(fresh, names(model), dict(state.read_tensors(tmp_path / "o.safetensors")), info)
    for parameter in model.parameters():
        before, after = optimizer.state[parameter], fresh.state[parameter]
        inner = after.pop("quantised")
        assert (inner["inner"].dtype, inner["inner"].tolist(), inner["block"]) == (torch.uint8, [1, 1, 1], 256)
        assert {key: value for key, value in after.items() if not isinstance(value, Tensor)} == {
            "step": 7,
            "side": "right",
            "overlaps": [0.1, None],
        }
        for key in ("codes", "moment"):
            assert after[key].dtype == before[key].dtype
            assert torch.equal(after[key], before[key])
    assert fresh.param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop, lambda p: torch.optim.SGD(p, momentum=0.9), torch.optim.Adafactor]
)
def test_a_restored_optimizer_continues_bit_for_bit(make: Any) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    model = bf16_model().float()
    optimizer = make(model.parameters())
    step(model, optimizer, 1)
    tensors, info = state.optimizer_tensors(optimizer, names(model))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    twin = bf16_model().float()
    twin.load_state_dict(model.state_dict())
    restored = make(twin.parameters())
    state.load_optimizer(restored, names(twin), tensors, info)
    for seed in (2, 3):
        step(model, optimizer, seed)
        step(twin, restored, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_mismatches_are_refused_by_name() -> None:
    model = bf16_model()
    optimizer = Codes(model.parameters())
    optimizer.step()
    tensors, info = state.optimizer_tensors(optimizer, names(model))
    with pytest.raises(ResumeRefused, match=r"written by tests\.core\.test_state\.Codes, this run uses torch\.optim\.sgd\.SGD"):
        state.load_optimizer(torch.optim.SGD(model.parameters()), names(model), tensors, info)
    with pytest.raises(ResumeRefused, match=r"1\.bias is in group 0 on one side only"):
        state.load_optimizer(Codes(list(model.parameters())[:3]), names(model), tensors, info)
    with pytest.raises(ResumeRefused, match="format 9 of the checkpoint"):
        state.load_optimizer(optimizer, names(model), tensors, {**info, "format_version": 9})
    optimizer.state[next(model.parameters())]["projector"] = object()
    with pytest.raises(InputError, match=r"0\.weight/projector is a object"):
        state.optimizer_tensors(optimizer, names(model))


def test_tied_and_strided_tensors_are_written_once_and_whole(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    found = state.weights(model)
    assert list(found) == ["embed.weight"]
    base = torch.arange(12.0).view(3, 4)
    state.write_tensors(tmp_path / "w.safetensors", {"a": base, "rows": base[1:], "turned": base.t()})
    back = dict(state.read_tensors(tmp_path / "w.safetensors"))
    assert torch.equal(back["a"], base)
    assert torch.equal(back["rows"], base[1:])
    assert torch.equal(back["turned"], base.t())


def test_weights_of_another_model_are_refused_by_name() -> None:
    model = nn.Linear(3, 2)
    good = state.weights(nn.Linear(3, 2))
    with pytest.raises(ResumeRefused, match=r"weight is \(2, 3\) torch.float64 in the checkpoint"):
        state.load_weights(model, iter({"weight": good["weight"].double()}.items()), {})
    with pytest.raises(ResumeRefused, match="holds extra, which this model does not have"):
        state.load_weights(model, iter({**good, "extra": good["bias"]}.items()), {})
    with pytest.raises(ResumeRefused, match="bias is not in the checkpoint"):
        state.load_weights(model, iter({"weight": good["weight"]}.items()), {})
