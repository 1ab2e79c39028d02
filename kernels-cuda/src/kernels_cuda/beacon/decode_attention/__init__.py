"""Attention of one token over a memory and an open window, both ragged. B batch, H heads, G key heads, M and W places, d head size."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.beacon.decode_attention import binding, reference
from kernels_cuda.beacon.tables import DTYPES, looked_at

__all__ = ["decode_attention"]


def decode_attention(
    q: Tensor, k_mem: Tensor, v_mem: Tensor, mem_len: Tensor, k_raw: Tensor, v_raw: Tensor, raw_len: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale q K') V and its log-sum over the first mem_len[b] entries of memory and raw_len[b] of the window: [B, H, 1, d], [B, H].

    q: [B, H, 1, d], rotated; float32, bfloat16, float64, or float16 (always computed by the reference). k_mem, v_mem: [B, G, M, d] and
    k_raw, v_raw: [B, G, W, d] like q, rotated, H a multiple of G: heads that share a key follow one another, and nothing is expanded or
    copied. mem_len, raw_len: int32 [B]. Arithmetic is float32 (float64) with one rounding; the log-sum is not rounded. A row of no keys
    gives zeros and -inf. What lies behind a row's lengths is not looked at. Where a gradient is asked for, the reference computes.

    A length that its segment does not hold raises ValueError on a CPU; on a GPU, which nobody waits for, the device's assertion fails at
    the next point where somebody does. Raises ValueError for shapes, dtypes or devices that do not fit.

    >>> k, one = torch.tensor([[[[0.0, 1.0], [2.0, 0.0]]]]), torch.ones(1, dtype=torch.int32)
    >>> out, lse = decode_attention(torch.zeros(1, 1, 1, 2), k, k, one, k, k, 2 * one, 1.0)
    >>> [[round(x, 3) for x in out.flatten().tolist()], round(lse.item() - torch.tensor(3.0).log().item(), 3)]
    [[0.667, 0.667], 0.0]
    """
    check.dtype("q", q, DTYPES)
    check.shapes(q=(q, "BH1d"), k_mem=(k_mem, "BGMd"), v_mem=(v_mem, "BGMd"), mem_len=(mem_len, "B"))
    check.shapes(q=(q, "BH1d"), k_mem=(k_mem, "BGMd"), k_raw=(k_raw, "BGWd"), v_raw=(v_raw, "BGWd"), raw_len=(raw_len, "B"))
    if q.shape[2] != 1:
        check.fail("q", f"shape {tuple(q.shape)}", f"holds {q.shape[2]} tokens", "give one; put those that see the same into H")
    if k_mem.shape[1] == 0 or q.shape[1] % k_mem.shape[1]:
        check.fail("q", f"{q.shape[1]} heads", f"do not share {k_mem.shape[1]} key heads evenly", "give a multiple of them")
    check.same("dtype", q=q, k_mem=k_mem, v_mem=v_mem, k_raw=k_raw, v_raw=v_raw)
    for name, number in (("mem_len", mem_len), ("raw_len", raw_len)):
        check.dtype(name, number, (torch.int32,))
    check.same("device", q=q, k_mem=k_mem, v_mem=v_mem, mem_len=mem_len, k_raw=k_raw, v_raw=v_raw, raw_len=raw_len)
    for name, number, keys in (("mem_len", mem_len, k_mem), ("raw_len", raw_len, k_raw)):
        if looked_at(number):
            low, high = (int(x) for x in number.aminmax())
            if low < 0 or high > keys.shape[2]:
                check.fail(name, min(low, 0) or high, f"is not in the {keys.shape[2]} places", "give 0 to that many")
        elif number.device.type == "cuda":
            torch._assert_async(((number >= 0) & (number <= keys.shape[2])).all(), f"decode_attention: {name} is out of range")
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_mem, v_mem, k_raw, v_raw))
    if learns or q.dtype == torch.float16 or not (library := choice.library(binding.OP, q.device.type)):
        return reference.decode_attention(q, k_mem, v_mem, mem_len, k_raw, v_raw, raw_len, scale)
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_mem, v_mem, k_raw, v_raw)]
    grouped = rows[0].reshape(len(q), k_mem.shape[1], q.shape[1] // k_mem.shape[1], q.shape[3])
    out, lse, *found = binding.buffers(grouped, k_mem, k_raw)
    lengths = mem_len.contiguous(), raw_len.contiguous()
    getattr(torch.ops, library).decode_attention_(grouped, *rows[1:3], lengths[0], *rows[3:], lengths[1], scale, out, lse, *found)
    return out.view(q.shape), lse.view(q.shape[:2])
