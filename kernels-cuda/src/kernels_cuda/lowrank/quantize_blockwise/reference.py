"""The definition of the op, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_cuda.lowrank.blocks import absmax_shape, columns_of


def quantize_blockwise(
    x: Tensor, code: Tensor, block: int = 256, row_aligned: bool = False, nonzero: bool = False
) -> tuple[Tensor, Tensor]:
    """See the public function of the same name; quotients have the dtype of x."""
    shape, columns = absmax_shape(x, block, row_aligned), columns_of(x, row_aligned)
    if x.numel() == 0:
        return torch.empty_like(x, dtype=torch.uint8), x.new_empty(shape)
    blocks = F.pad(x.reshape(-1, columns), (0, -columns % block)).unflatten(1, (-1, block))
    absmax = blocks.abs().amax(2, keepdim=True)
    quotients = (blocks / absmax.masked_fill(absmax == 0, 1)).double()
    # float64 holds the middle of two float32 values exactly
    bounds = (code[:-1].double() + code[1:].double()) / 2
    codes = torch.searchsorted(bounds, quotients)
    if nonzero:
        codes = codes.masked_fill((codes == 0) & (blocks > 0), 1)
    codes = codes.masked_fill(~absmax.isfinite(), 0).to(torch.uint8)
    return codes.flatten(1)[:, :columns].contiguous().view(x.shape), absmax.view(shape)
