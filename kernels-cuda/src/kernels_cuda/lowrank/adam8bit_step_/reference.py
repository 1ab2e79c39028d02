"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from kernels_cuda.lowrank.adam_step_.reference import adam_step_
from kernels_cuda.lowrank.dequantize_blockwise.reference import dequantize_blockwise
from kernels_cuda.lowrank.quantize_blockwise.reference import quantize_blockwise


def adam8bit_step_(
    L: Tensor,
    mq: Tensor,
    m_absmax: Tensor,
    vq: Tensor,
    v_absmax: Tensor,
    code_s: Tensor,
    code_u: Tensor,
    out: Tensor,
    b1: float,
    b2: float,
    eps: float,
    step: int,
    block: int = 256,
    row_aligned: bool = False,
    *,
    decay: float = 0.0,
    alpha: float = -1.0,
) -> None:
    """See the public function of the same name."""
    m = dequantize_blockwise(mq, m_absmax, code_s, block, row_aligned)
    v = dequantize_blockwise(vq, v_absmax, code_u, block, row_aligned)
    adam_step_(L, m, v, out, b1, b2, eps, step, decay=decay, alpha=alpha)
    for codes, absmax, value, code, nonzero in ((mq, m_absmax, m, code_s, False), (vq, v_absmax, v, code_u, True)):
        new_codes, new_absmax = quantize_blockwise(value, code, block, row_aligned, nonzero)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)
