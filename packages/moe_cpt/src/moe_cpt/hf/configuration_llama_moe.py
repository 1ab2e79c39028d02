"""Configuration of a LLaMA whose feed-forward layers are mixtures of experts."""

# transformers leaves its constructors without types
# mypy: allow-untyped-calls

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

GATES = (
    "TopKBalancedNoisyGate",
    "SwitchBalancedGate",
    "UniformPlainGate",
    "UniformLearnableGate",
    "RandomPlainGate",
    "RandomLearnableGate",
)
CALCULATORS = ("UniversalCalculator", "UniformCalculator", "SwitchDropTokenCalculator")


def converted_layers(chosen: str | list[int] | dict[str, int], layers: int) -> list[int]:
    """Layers with a mixture: all, those of a list, or all but the first and last few.

    >>> converted_layers({"skip_first": 1, "skip_last": 2}, 6)
    [1, 2, 3]
    """
    if isinstance(chosen, dict):
        return list(range(chosen.get("skip_first", 0), layers - chosen.get("skip_last", 0)))
    return list(range(layers)) if isinstance(chosen, str) else sorted(set(chosen))


class LlamaMoEConfig(LlamaConfig):  # transformers makes dataclasses of its configs by itself
    """A LlamaConfig and how its feed-forward layers are split. `intermediate_size` is the width m of the dense layers.

    N = `num_experts` routed experts, of which K = `num_selects` see a token, and S = `num_shared_experts` that always do; each
    has m / (N + S) neurons, or those that `size_experts` gives by layer and routed expert.
    """

    model_type = "llama_moe"
    # a dense LLaMA's plans name tensors that are not here
    base_model_tp_plan = {}
    base_model_pp_plan = {}

    num_experts: int = 16
    num_selects: int = 4
    num_shared_experts: int = 0
    size_experts: list[list[int]] | None = None
    moe_layers: str | list[int] | dict[str, int] = "all"
    shared_scale_factor: float = 1.0
    gate_type: str = "TopKBalancedNoisyGate"
    gate_network: str = "mlp"
    gate_use_softmax: bool = True
    gate_use_balance: bool = True
    gate_add_noise: bool = True
    gate_balance_loss_weight: float = 1e-2
    gate_noise_epsilon: float = 1e-2
    calculator_type: str = "UniversalCalculator"
    drop_tokens: bool = True
    dropped_padding: str = "zero"
    capacity_factor: float = 1.25
    multiply_gate_scores: bool = True
    score_scale_factor: float | int | list[float] = 4.0
    add_weight_norm: bool = False
    balance_scope: str = "micro"
    experts_backend: str = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        experts = self.num_experts + self.num_shared_experts
        if not 1 <= self.num_selects <= self.num_experts:
            raise ValueError(f"num_selects: {self.num_selects} of {self.num_experts} experts; use 1 to {self.num_experts}")
        numbers = converted_layers(self.moe_layers, self.num_hidden_layers)
        if not numbers or not 0 <= numbers[0] <= numbers[-1] < self.num_hidden_layers:
            raise ValueError(
                f"moe_layers: {self.moe_layers} of {self.num_hidden_layers} layers; name at least one of 0 to {self.num_hidden_layers - 1}"
            )
        if self.num_shared_experts < 0 or (self.size_experts is None and self.intermediate_size % experts):
            raise ValueError(
                f"num_experts: {experts} experts do not divide intermediate_size {self.intermediate_size}; use a divisor of it"
            )
        if self.size_experts is not None:
            found = [len(self.size_experts), *{len(layer) for layer in self.size_experts}]
            if found != [self.num_hidden_layers, self.num_experts]:
                raise ValueError(f"size_experts: {found} sizes; give {self.num_experts} for each of {self.num_hidden_layers} layers")
            if self.num_shared_experts and len({size for layer in self.size_experts for size in layer}) > 1:
                raise ValueError("size_experts: shared experts go with routed ones of one size; make them equal")
        for name, allowed in (
            ("gate_network", ("linear", "mlp")),
            ("gate_type", GATES),
            ("calculator_type", CALCULATORS),
            ("dropped_padding", ("zero", "input")),
            ("balance_scope", ("micro", "global")),
            ("experts_backend", ("auto", "fused", "grouped_mm", "loop")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not known; use {' or '.join(allowed)}")
        one = [name for name in (self.gate_type, self.calculator_type) if name.startswith("Switch")]
        if one and self.num_selects != 1:
            raise ValueError(f"num_selects: {one[0]} sends a token to one expert, not to {self.num_selects}; use 1")
        every = [name for name in (self.gate_type, self.calculator_type) if name.startswith("Uniform")]
        if every and self.num_selects != self.num_experts:
            raise ValueError(f"num_selects: {every[0]} uses all experts, not {self.num_selects} of them; use {self.num_experts}")
        if isinstance(self.score_scale_factor, list) and len(self.score_scale_factor) != self.num_hidden_layers:
            raise ValueError(
                f"score_scale_factor: {len(self.score_scale_factor)} values for {self.num_hidden_layers} layers; give one number, or one per layer"
            )

    @property
    def converted(self) -> list[int]:
        """Layers with a mixture; the others are dense."""
        return converted_layers(self.moe_layers, self.num_hidden_layers)

    @property
    def has_router(self) -> bool:
        """Whether the gate looks at the token."""
        return not self.gate_type.endswith("PlainGate")

    @property
    def has_noise_weights(self) -> bool:
        """Whether the spread of routing noise is learned."""
        return self.gate_add_noise and self.gate_type == "TopKBalancedNoisyGate"

    @property
    def balance_weight(self) -> float:
        """Weight of the balance loss; 0 for gates that have none."""
        return self.gate_balance_loss_weight if self.gate_use_balance and "Balanced" in self.gate_type else 0.0

    @property
    def may_drop(self) -> bool:
        """Whether experts refuse tokens beyond their capacity."""
        return self.calculator_type == "SwitchDropTokenCalculator" and self.drop_tokens

    @property
    def expert_size(self) -> int:
        """Neurons of one expert, of the largest one where they differ."""
        if self.size_experts is not None:
            return max(size for layer in self.size_experts for size in layer)
        return self.intermediate_size // (self.num_experts + self.num_shared_experts)

    @property
    def stored_size(self) -> int:
        """Neurons of one expert as stored: a multiple of 8, since grouped products want rows of 16 bytes; those added are zero."""
        return -(-self.expert_size // 8) * 8

    def scale_of(self, layer: int) -> float:
        """Factor of the routed experts' output in one layer."""
        scale = self.score_scale_factor
        return float(scale[layer] if isinstance(scale, list) else scale)


__all__ = ["LlamaMoEConfig"]
