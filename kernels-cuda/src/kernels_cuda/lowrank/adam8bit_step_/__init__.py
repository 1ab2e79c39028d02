"""Adam on moments kept as 8-bit codes: dequantise, update and requantise in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.lowrank.adam8bit_step_ import binding, reference
from kernels_cuda.lowrank.blocks import check_absmax, check_adam, check_block, check_code, check_contiguous, check_like, columns_of

__all__ = ["adam8bit_step_"]


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
    """One update of Adam whose moments are codes: what `adam_step_` does, with new moments in float32 until they are requantised.

    mq, m_absmax and vq, v_absmax are as `quantize_blockwise` makes them, with the signed book code_s and the unsigned book
    code_u; a second moment above 0 never takes code 0. L and out are float32 and of the codes' shape. out <- decay out - alpha N.
    Everything that changes is contiguous and overlaps nothing else.

    Raises ValueError for shapes, dtypes, devices or settings that do not fit.

    >>> L, out, code = torch.tensor([3.0]), torch.empty(1), torch.linspace(-1, 1, 256)
    >>> (mq, m_absmax), (vq, v_absmax) = ((torch.zeros(1, dtype=torch.uint8), torch.zeros(1)) for _ in range(2))
    >>> adam8bit_step_(L, mq, m_absmax, vq, v_absmax, code, code.abs().sort().values, out, 0.9, 0.999, 1e-8, 1)
    >>> round(out.item(), 5), round(m_absmax.item(), 5)
    (1.0, 0.3)
    """
    for name, tensor in (("L", L), ("out", out)):
        check.dtype(name, tensor, (torch.float32,))
    for name, tensor in (("mq", mq), ("vq", vq)):
        check.dtype(name, tensor, (torch.uint8,))
    check_block(block)
    check_like("L", L, mq=mq, vq=vq, out=out)
    for name, tensor in (("m_absmax", m_absmax), ("v_absmax", v_absmax)):
        check_absmax(name, tensor, L, block, row_aligned)
    check.same("device", L=L, m_absmax=m_absmax, v_absmax=v_absmax)
    check_contiguous(m_absmax=m_absmax, v_absmax=v_absmax)
    check_code("code_s", code_s, L)
    check_code("code_u", code_u, L)
    check_adam(b1, b2, eps, step)
    moments = mq, m_absmax, vq, v_absmax
    library = choice.library(binding.OP, L.device.type)
    if not library:
        reference.adam8bit_step_(L, *moments, code_s, code_u, out, b1, b2, eps, step, block, row_aligned, decay=decay, alpha=alpha)
    elif L.numel() > 0:
        columns = columns_of(L, row_aligned)
        books = code_s.contiguous(), code_u.contiguous()
        getattr(torch.ops, library).adam8bit_step_(L.contiguous(), *moments, *books, out, b1, b2, eps, step, columns, block, decay, alpha)
