"""Gates: which experts see a token and with what weight, and the loss that keeps the experts equally busy."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels_cuda.moe import noisy_load, route
from lm_core import counter

# B rows, T positions of a row, R tokens (B x T), D hidden size, N experts, K selected experts


@dataclass(frozen=True)
class Gate:
    """What a gate says about R tokens. `score_RK` are coefficients before the scale factor.

    `importance_N` and `load_N` are sums over real tokens and carry gradients; `count_N` are tokens per expert, `dropped` the
    number of tokens that no expert took.
    """

    experts_RK: Tensor
    score_RK: Tensor
    importance_N: Tensor
    load_N: Tensor
    count_N: Tensor
    dropped: Tensor


@dataclass
class Routing:
    """What a forward pass tells the gates of all layers, and by layer what they said.

    An object and not a mapping, since engines that shard a model rebuild the mappings they pass on.
    """

    index: Tensor | None = None  # B, global sample numbers: the address of noise
    mask: Tensor | None = None  # B x T, 1 for real tokens
    seed: int = 0
    gates: dict[int, Gate] = field(default_factory=dict)

    def sums(self, name: str) -> Tensor:
        """`importance_N`, `load_N` or `count_N` of all layers, L x N, or `dropped`, L."""
        return torch.stack([getattr(self.gates[layer], name) for layer in sorted(self.gates)])


class Router(nn.Module):
    """Logits of a token over the experts, and the spread of their noise, both at least in float32."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, experts = config.hidden_size, config.num_experts
        if config.gate_network == "linear":
            self.proj = nn.Linear(hidden, experts, bias=False)
        else:
            self.fc1 = nn.Linear(hidden, experts, bias=False)
            self.fc2 = nn.Linear(experts, experts, bias=False)
        self.mlp = config.gate_network == "mlp"
        if config.has_noise_weights:
            self.noise = nn.Linear(hidden, experts, bias=False)
        self.epsilon = config.gate_noise_epsilon

    def forward(self, x_RD: Tensor, noisy: bool) -> tuple[Tensor, Tensor | None]:
        """Logits, and with `noisy` the standard deviations softplus(x W_noise^T) + epsilon, both R x N."""
        # autocast knows no tensors without values
        with nullcontext() if x_RD.is_meta else torch.autocast(x_RD.device.type, enabled=False):
            x_RD = x_RD.to(torch.promote_types(x_RD.dtype, torch.float32))
            if self.mlp:
                logits = _linear(torch.tanh(_linear(x_RD, self.fc1)), self.fc2)
            else:
                logits = _linear(x_RD, self.proj)
            return logits, F.softplus(_linear(x_RD, self.noise)) + self.epsilon if noisy else None


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype))


def noise(seed: int, layer: int, index_B: Tensor, length: int, experts: int) -> Tensor:
    """Standard normals, (B * length) x N, addressed by (seed, layer, sample number, position)."""
    drawn = counter.normal(counter.derive(seed, "gate", layer), "gate", index_B, length * experts)
    return drawn.view(-1, experts)


def gumbel(seed: int, layer: int, index_B: Tensor, length: int, experts: int) -> Tensor:
    """Standard Gumbel draws, (B * length) x N, addressed like `noise`; the argmax of logits plus them follows softmax."""
    drawn = counter.uniform(counter.derive(seed, "gate", layer, 1), "gate", index_B, length * experts)
    return -torch.log(-torch.log(drawn.double() + 2.0**-25)).float().view(-1, experts)


def drop_order(seed: int, layer: int, index_B: Tensor, length: int) -> Tensor:
    """Random ranks of the tokens, B * length, addressed like `noise`: experts take lower ones first."""
    return counter.bits(counter.derive(seed, "gate", layer, 2), "gate", index_B, length).flatten()


def gate(
    logits_RN: Tensor,
    k: int,
    *,
    sigma_RN: Tensor | None = None,
    noise_RN: Tensor | None = None,
    mask_R: Tensor | None = None,
    softmax: bool = True,
    multiply: bool = True,
) -> Gate:
    """The k largest (noisy) logits of every token, ties to the lower expert, with softmax over those k values.

    Without `softmax` the scores are the logits; without `multiply` every selected expert has coefficient 1, and only the
    importance keeps the scores. Tokens where `mask_R` is 0 are routed but count nothing.
    """
    noisy_RN = logits_RN if sigma_RN is None or noise_RN is None else logits_RN + noise_RN.to(logits_RN.dtype) * sigma_RN
    found = route(noisy_RN, k, mask_R, softmax)
    count_N = load_N = found.count_N.to(logits_RN.dtype)
    if sigma_RN is not None and k < logits_RN.shape[1]:
        load_N = noisy_load(logits_RN, noisy_RN, sigma_RN, k, mask_R)
    score_RK = found.score_TK if multiply else torch.ones_like(found.score_TK)
    return Gate(found.idx_TK, score_RK, found.importance_N, load_N, count_N, count_N.new_zeros(()))


def switch_gate(logits_RN: Tensor, *, gumbel_RN: Tensor | None = None, mask_R: Tensor | None = None, multiply: bool = True) -> Gate:
    """The expert with the largest (in training: perturbed) logit, its score the softmax over all experts (Fedus et al. 2021).

    `importance_N` sums the probabilities of all experts, not only of the chosen one: that is what the balance loss wants.
    """
    perturbed_RN = logits_RN if gumbel_RN is None else logits_RN + gumbel_RN.to(logits_RN.dtype)
    experts_R1 = torch.sort(perturbed_RN, dim=-1, descending=True, stable=True).indices[:, :1]
    probability_RN = torch.softmax(logits_RN, dim=-1)
    score_R1 = probability_RN.gather(1, experts_R1)
    real_R1 = torch.ones_like(score_R1) if mask_R is None else mask_R[:, None].to(score_R1.dtype)
    count_N = (torch.zeros_like(logits_RN).scatter(1, experts_R1, 1.0) * real_R1).sum(0).detach()
    importance_N = (probability_RN * real_R1).sum(0)
    return Gate(experts_R1, score_R1 if multiply else torch.ones_like(score_R1), importance_N, count_N, count_N, count_N.new_zeros(()))


def fixed_gate(
    keys_RN: Tensor,
    k: int,
    logits_RN: Tensor | None,
    *,
    mask_R: Tensor | None = None,
    softmax: bool = True,
    multiply: bool = True,
) -> Gate:
    """The experts of the k largest keys, whatever the token: all of them, or random ones. Their scores are those of their logits.

    Without logits every score is 1 / k, or 1 without `softmax`.
    """
    experts_RK = torch.sort(keys_RN, dim=-1, descending=True, stable=True).indices[:, :k]
    own_RK = torch.zeros_like(experts_RK, dtype=keys_RN.dtype) if logits_RN is None else logits_RN.gather(1, experts_RK)
    score_RK = torch.softmax(own_RK, dim=-1) if softmax else torch.ones_like(own_RK) if logits_RN is None else own_RK
    real_R1 = torch.ones_like(score_RK[:, :1]) if mask_R is None else mask_R[:, None].to(score_RK.dtype)
    importance_N = torch.zeros_like(keys_RN, dtype=score_RK.dtype).scatter(1, experts_RK, score_RK * real_R1).sum(0)
    count_N = (torch.zeros_like(keys_RN).scatter(1, experts_RK, 1.0) * real_R1).sum(0).detach()
    return Gate(experts_RK, score_RK if multiply else torch.ones_like(score_RK), importance_N, count_N, count_N, count_N.new_zeros(()))


def within_capacity(said: Gate, order_R: Tensor, factor: float, mask_R: Tensor | None) -> tuple[Gate, Tensor]:
    """The gate after every expert took at most max(1, floor(factor * T / N)) of the T real tokens; and which tokens were dropped.

    Tokens come in the order of `order_R`, padding last. A dropped token has score 0.
    """
    experts = len(said.count_N)
    real_R = torch.ones_like(order_R, dtype=torch.bool) if mask_R is None else mask_R.bool()
    first_R = torch.argsort(torch.where(real_R, order_R, order_R.max() + 1), stable=True)
    chosen_RN = F.one_hot(said.experts_RK[first_R, 0].long(), experts)
    # place of a token among those of its expert
    place_R = torch.empty_like(order_R).scatter(0, first_R, (chosen_RN.cumsum(0) * chosen_RN).sum(1) - 1)
    capacity = (factor * real_R.sum() / experts).floor().clamp(min=1)
    dropped_R = (place_R >= capacity) & real_R
    kept_R1 = (~dropped_R)[:, None].to(said.score_RK.dtype)
    return replace(said, score_RK=said.score_RK * kept_R1, dropped=dropped_R.sum()), dropped_R


def cv_squared(values: Tensor) -> Tensor:
    """Squared coefficient of variation along the last dimension: unbiased variance over squared mean, 0 for a single value.

    >>> round(float(cv_squared(torch.tensor([1.0, 2, 3, 4]))), 5)
    0.26667
    """
    if values.shape[-1] == 1:
        return torch.zeros_like(values[..., 0])
    ratio: Tensor = values.var(-1) / (values.mean(-1).square() + 1e-10)
    return ratio


def balance_loss(importance_LN: Tensor, load_LN: Tensor, weight: float, switch: bool = False) -> Tensor:
    """weight * (CV^2(importance) + CV^2(load)), summed over layers.

    For a `switch` gate weight * N * sum_j mean_t(probability_j) * fraction_j, where importance sums probabilities and load tokens.
    """
    if switch:
        tokens_L1 = load_LN.sum(-1, keepdim=True).clamp(min=1)
        return weight * load_LN.shape[-1] * (importance_LN / tokens_L1 * load_LN / tokens_L1).sum()
    total: Tensor = weight * (cv_squared(importance_LN) + cv_squared(load_LN)).sum()
    return total
