"""How many tokens each expert can expect when routing is noisy. T tokens, N experts, K of them for a token."""

from __future__ import annotations

from torch import Tensor

from kernels_cuda import choice
from kernels_cuda.moe import gates
from kernels_cuda.moe.noisy_load import binding, reference

__all__ = ["noisy_load"]


def noisy_load(logits_TN: Tensor, noisy_TN: Tensor, sigma_TN: Tensor, k: int, mask_T: Tensor | None = None) -> Tensor:
    """load (N): sum over tokens of the chance of each expert to be among the k largest if its own noise were drawn again.

    The chance is Phi((logits - tau) / sigma), where tau is what the expert has to exceed while the noise of the others stays: the (k+1)-th
    largest of noisy_TN for an expert that is among the k largest, the k-th largest for the others (Shazeer et al. 2017, appendix A).
    Ties go to the lower expert. Tokens where `mask_T` is 0 count nothing.

    The three are float32, or float64 (always computed by the reference, as more than 256 experts or a k above 16 are), and differentiable,
    noisy_TN by way of tau. k is below N. Sums have a fixed order. Raises ValueError for shapes, dtypes or devices that do not fit.

    >>> import torch
    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> [round(value, 4) for value in noisy_load(logits, logits, torch.ones(1, 3), 1).tolist()]
    [0.8413, 0.1587, 0.0228]
    """
    gates.check_rows(k, mask_T, logits_TN.shape[-1] - 1, logits=logits_TN, noisy=noisy_TN, sigma=sigma_TN)
    tokens, experts = logits_TN.shape
    # the kernels find one more than k
    if logits_TN.element_size() == 8 or not tokens or not gates.fits(k, experts) or not choice.library(binding.OP, logits_TN.device.type):
        return reference.noisy_load(logits_TN, noisy_TN, sigma_TN, k, mask_T)
    load_N: Tensor = binding.forward(logits_TN, noisy_TN, sigma_TN, gates.bits(mask_T), k)
    return load_N
