"""Masked diffusion: which tokens are masked, seen and drawn, as a function of their address."""

from kernels_cuda.mdm.noise_fixed_count import masked_count, noise_fixed_count
from kernels_cuda.mdm.noise_tokens import masked_tokens, noise_tokens
from kernels_cuda.mdm.reveal_tokens import reveal_tokens
from kernels_cuda.mdm.token_mask_keep import token_mask_keep

__all__ = ["masked_count", "masked_tokens", "noise_fixed_count", "noise_tokens", "reveal_tokens", "token_mask_keep"]
