"""The recurrence of RWKV-6: a state that decays and learns at every token, and a bonus for the token at hand.

B batch, T time, H heads, N head size, Q packed sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.rwkv_distill.recurrence import step
from kernels_cuda.rwkv_distill.sequences import check_inputs, check_no_gradient, check_sequences, check_state
from kernels_cuda.rwkv_distill.wkv6 import binding, reference

__all__ = ["wkv6", "wkv6_step"]


def wkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Outputs [B, T, H, N] of the recurrence, and the state after the last token if `output_final_state`, else None.

    For every head, with S in R^(N x N), rows for values and columns for keys, S_0 = initial_state or 0:

        d = exp(-exp(w))
        y = (S + v (u k)^T) r
        S = S diag(d) + v k^T

    r, k, v, w: [B, T, H, N], u: [H, N], one dtype: float32, bfloat16 or float64; N is 32, 64 or 128. y has their dtype. States are
    [B, H, N, N] in float32 (float64 for float64, which is always computed by the reference); all inputs and the initial state
    are differentiable, also through the final state.
    mask: [B, T], bool or integer. Where it is 0 the state stays, y and all gradients are 0, and inputs may hold anything.
    cu_seqlens: int32 or int64 [Q + 1], where B is 1: sequence i is made of tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1, and states
    are [Q, H, N, N]. On a GPU its numbers are not looked at, only kept within the T tokens.

    Backward keeps one state per 32 tokens and head. With `kernels_cuda.use("cuda-chunked")` bfloat16 inputs on GPUs of compute
    capability 8.0 or above are computed by chunks of 16 tokens on tensor cores, products of bfloat16 numbers summed in float32, and
    backward keeps one state per 64 tokens.

    Raises ValueError for shapes, dtypes, devices, sizes or cu_seqlens that do not fit.

    >>> ones = torch.ones(1, 3, 1, 32)
    >>> y, _ = wkv6(ones, ones, ones, torch.full_like(ones, -100.0), torch.zeros(1, 32))  # no decay: a sum of v (k . r), later
    >>> y[0, :, 0, 0].tolist()
    [0.0, 32.0, 64.0]
    """
    check.shapes(
        r=(r, "BTHN"),
        k=(k, "BTHN"),
        v=(v, "BTHN"),
        w=(w, "BTHN"),
        u=(u, "HN"),
        mask=(mask, "BT"),
        cu_seqlens=(cu_seqlens, "Q"),
    )
    inputs = {"r": r, "k": k, "v": v, "w": w, "u": u}
    check_inputs(inputs)
    num_sequences = check_sequences(r, mask, cu_seqlens)
    check_state("initial_state", initial_state, r, num_sequences)
    if r.dtype == torch.float64 or not choice.library(binding.OP, r.device.type):
        return reference.wkv6(
            r,
            k,
            v,
            w,
            u,
            initial_state=initial_state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            output_final_state=output_final_state,
        )
    if mask is not None:
        mask = mask.bool()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.int()
    gradient = torch.is_grad_enabled() and any(value.requires_grad for value in (*inputs.values(), initial_state) if value is not None)
    chunked = r.dtype == torch.bfloat16 and choice.chunked(r.device, binding.SHARED_BYTES[r.shape[-1]])
    y, final, _ = binding.forward(r, k, v, w, u, initial_state, mask, cu_seqlens, output_final_state, gradient, chunked)
    return y, final if output_final_state else None


def wkv6_step(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> Tensor:
    """One token of `wkv6` for every sequence: inputs and result [B, H, N], u [H, N]; `state` [B, H, N, N] changes in place. No gradients.

    Raises ValueError like `wkv6`, and for tensors that require a gradient while gradients are recorded.

    >>> ones, state = torch.ones(1, 1, 32), torch.zeros(1, 1, 32, 32)
    >>> wkv6_step(ones, ones, ones, ones, ones[0], state)[0, 0, 0].item(), state[0, 0, 0, 0].item()
    (32.0, 1.0)
    """
    inputs = {"r": r, "k": k, "v": v, "w": w, "u": u}
    check.shapes(r=(r, "BHN"), k=(k, "BHN"), v=(v, "BHN"), w=(w, "BHN"), u=(u, "HN"))
    check_inputs(inputs)
    check_state("state", state, r, r.shape[0])
    check_no_gradient({**inputs, "state": state}, "wkv6")
    if r.dtype == torch.float64 or not choice.library(binding.OP, r.device.type):
        return reference.wkv6_step(r, k, v, w, u, state)
    return step("wkv6", (r, k, v, w, u), state)
