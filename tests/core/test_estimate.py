from __future__ import annotations

import copy
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_core import estimate as module
from lm_core.data import Data, build_data
from lm_core.data.loader import Loader
from lm_core.data.vocab import byte_tokenizer
from lm_core.engine import Engine, make_engine
from lm_core.estimate import Estimate, estimate, flops_per_token, parameters, peak_bytes, reset_peak
from lm_core.memory import Live, current_bytes
from lm_core.method import Batch, Loss, Method
from lm_core.models import CausalLoss, checkpoint_activations, load_model, lora
from lm_core.options import RunConfig
from lm_core.progress import Budget
from lm_core.run import make_loader
from lm_core.testing import spawn
from lm_core.train import train_step

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
PRESETS = {
    "llama": {"model_type": "llama", **SIZES},
    "tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 6, "num_experts_per_tok": 2},
}


def model(name: str = "llama") -> Any:
    return load_model(name, presets=PRESETS)


def matmul_elements(name: str) -> int:
    """Elements of all matrices that tokens are multiplied with, written out for the llama layout."""
    d, ffn, layers, vocab, kv = 64, 96, 3, 512, 32
    experts = 3 * d * ffn if name != "mixtral" else 2 * 3 * d * ffn + 6 * d
    return layers * (2 * d * d + 2 * d * kv + experts) + vocab * d


# PaLM, appendix B: 6 per element and 12 per layer, position and width of attention
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_flops_equal_the_closed_form(name: str) -> None:
    assert flops_per_token(CausalLoss(model(name)), 128) == 6 * matmul_elements(name) + 12 * 3 * 128 * 64


def test_recomputing_activations_adds_no_model_flops_and_the_mode_is_kept() -> None:
    plain, other = model(), model()
    checkpoint_activations(other)
    other.model.layers[0].eval()
    assert flops_per_token(other, 128) == flops_per_token(plain, 128)
    assert [layer.training for layer in other.model.layers] == [False, True, True]
    assert all(parameter.grad is None and parameter.device == CPU for parameter in other.parameters())


def test_what_is_frozen_costs_no_weight_gradient() -> None:
    frozen = model()
    frozen.base_model.layers.requires_grad_(False)
    head = 512 * 64
    assert flops_per_token(frozen, 128) == 4 * (matmul_elements("llama") - head) + 6 * head + 12 * 3 * 128 * 64


def test_parameters_count_tied_tensors_once_adapters_as_trained_and_experts_by_visits() -> None:
    assert parameters(model()).total - parameters(model("tied")).total == 512 * 64
    adapted = parameters(CausalLoss(lora(model(), r=2, target_modules=["q_proj"])))
    assert adapted.trained == 3 * 2 * (64 + 64)
    assert adapted.active == adapted.total == parameters(model()).total + adapted.trained
    mixed = parameters(model("mixtral"))
    assert mixed.total - mixed.active == 3 * (6 - 2) * 3 * 64 * 96


class NextToken(Method):
    name = "tied"

    def build(self) -> nn.Module:
        return CausalLoss(model(self.name))

    def losses(self, model: nn.Module, batch: Batch) -> Iterator[Loss]:
        yield Loss(total=model(batch["input_ids"], batch["labels"]))


class Layerwise(torch.optim.SGD):
    """Updates each weight as soon as its gradient is there."""

    per_layer = True
    grad_norm = 0.0

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, lr=0.1)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self.update)

    def update(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    def predicted_state_bytes(self) -> int:
        return 1234


class LayerwiseMethod(NextToken):
    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return Layerwise(groups)


def started(method: type[Method] = NextToken, **options: Any) -> tuple[Engine, Method, Loader, RunConfig]:
    config = RunConfig(model="tied", data=["synthetic:markov[64]"], max_length=128, **{"micro_batch_size": 4, **options})
    made = method(config)
    engine = make_engine(config, made, made.build(), CPU)
    data: Data = build_data(config, byte_tokenizer())
    return engine, made, make_loader(config, data, engine.data_rank, engine.data_world), config


@pytest.mark.parametrize("method", [NextToken, LayerwiseMethod])
def test_estimating_changes_nothing(method: type[Method]) -> None:
    engine, made, loader, config = started(method)
    before, place = copy.deepcopy(engine.model.state_dict()), loader.state_dict()
    estimate(engine, made, loader, config.limits(), flops=1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.model.state_dict().items())
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert loader.state_dict() == place
    assert not engine.optimizer.state


def foresee(method: type[Method] = NextToken, budget: str = "10 steps", **options: Any) -> Estimate:
    engine, made, loader, _ = started(method, **options)
    return estimate(engine, made, loader, Budget.parse(budget), flops=2.0)


def test_parts_of_memory_are_those_of_adamw_in_float32() -> None:
    found = foresee()
    total = parameters(model("tied")).total
    buffers = sum(buffer.nbytes for buffer in model("tied").buffers())
    assert found.parameters.total == found.parameters.trained == total
    assert found.memory.weights == 4 * total + buffers
    assert found.memory.gradients == 4 * total
    assert found.memory.optimizer == 8 * total
    # per token and layer at least the inputs of norms, matrices and products
    assert found.memory.activations > 4 * 128 * 3 * 4 * (6 * 64 + 3 * 96)
    assert found.memory.peak > found.memory.weights + found.memory.gradients + found.memory.optimizer


def test_recomputed_activations_are_fewer_and_more_micro_batches_hold_more_gradients() -> None:
    class Recomputed(NextToken):
        def build(self) -> nn.Module:
            built = super().build()
            checkpoint_activations(built)
            return built

    assert foresee(Recomputed).memory.activations < 0.7 * foresee().memory.activations


def test_layer_wise_updates_hold_one_gradient_and_say_what_they_keep() -> None:
    memory = foresee(LayerwiseMethod).memory
    assert memory.gradients == 4 * 512 * 64
    assert memory.optimizer == 1234


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ("7 steps", 7),
        ("1000 samples", 125),
        ("100_000 tokens", 98),
        ("100_000 tokens, 5 steps", 5),
        ("100 targets", 1),
        ("0.5 epochs", None),
    ],
)
def test_steps_follow_from_the_budget(budget: str, steps: int | None) -> None:
    engine, made, loader, _ = started(micro_batch_size=4, accumulate=2)
    found = estimate(engine, made, loader, Budget.parse(budget), flops=2.0)
    assert (found.samples, found.tokens) == (8, 1024)
    assert found.steps == (steps or -(-loader.epoch_samples // 16))
    assert found.to_dict()["run"] == {"steps": found.steps, "tokens": found.steps * 1024, "hours": found.steps * found.seconds / 3600}
    assert "parameters  total" in str(found)


def test_live_counts_storages_once_until_they_are_freed() -> None:
    known = torch.ones(1000)
    live = Live([known])
    with live:
        first = known * 2  # 4000
        view = first.view(10, 100)[2:]
        second = first + 1  # 8000
        del first, view
        third = torch.zeros(500)  # 4000 + 2000
        known.add_(1)
    assert live.peak() == 8000
    assert live.peak(without=[second]) == 4000
    assert third.sum() == 0


def test_the_peak_is_measured_from_the_reset_on() -> None:
    reset_peak(CPU)
    start = current_bytes(CPU)
    # pages straight from the system: the allocator may hold 64 MiB that earlier tests freed, and hand those out
    with mmap.mmap(-1, 64 * 2**20) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert 60 * 2**20 < peak_bytes(CPU) - start < 80 * 2**20
    reset_peak(CPU)
    assert peak_bytes(CPU) - start < 30 * 2**20


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989), ("NVIDIA B200", 2250), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("Tesla T4", 65), ("NVIDIA A10G", 125),
        ("Tesla V100-SXM2-32GB", 125), ("NVIDIA GeForce RTX 4090", 165), ("AMD Instinct MI300X", 1307),
    ],
)  # fmt: skip
def test_devices_are_known_by_the_names_torch_reports(name: str, tera: int) -> None:
    assert module._named_flops(name, "bf16") == tera * 1e12


def test_an_unknown_device_has_no_peak_and_the_cpu_is_measured() -> None:
    assert module._named_flops("Some GPU", "bf16") is None
    measured = module.peak_flops(CPU, "fp32")
    assert measured is not None
    assert 1e8 < measured < 1e14


def predicted_and_measured(name: str, size: tuple[int, int, int], folder: Path) -> tuple[int, int]:
    class Big(NextToken):
        def build(self) -> nn.Module:
            return CausalLoss(load_model(name, presets={"big": BIG}))

    batch, length, accumulate = size
    engine, made, *_ = started(Big, micro_batch_size=batch, accumulate=accumulate)
    ids = torch.randint(500, (batch, length), generator=torch.Generator().manual_seed(0))
    batches = [Batch({"input_ids": ids, "labels": ids}, index=torch.arange(batch), step=0) for _ in range(accumulate)]
    memory, _ = module._memory(engine, made, batches[0], accumulate)
    reset_peak(CPU)
    for _ in range(2):
        train_step(engine, made, batches, 1e-4)
    return memory.peak, peak_bytes(CPU)


BIG = {
    "model_type": "llama", "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("size", [(2, 192, 1), (1, 96, 2)])
def test_the_predicted_peak_is_within_15_percent_of_the_measured_one(size: tuple[int, int, int], tmp_path: Path) -> None:
    # its own process, since memory that earlier tests freed would be used again
    [(predicted, measured)] = spawn(predicted_and_measured, "big", size, tmp_path, world=1)
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.real
def test_the_predicted_peak_of_smollm2_is_within_15_percent_of_the_measured_one(tmp_path: Path) -> None:
    [(predicted, measured)] = spawn(predicted_and_measured, "smollm2-135m", (1, 128, 1), tmp_path, world=1)
    assert predicted == pytest.approx(measured, rel=0.15)
