"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.lowrank import dequantize_blockwise, quantize_blockwise
from kernels_cuda.lowrank.quantize_blockwise.cases import code_book, numbers


@pytest.mark.parametrize("implementation", ["reference", "cpu", "emulated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_come_back_within_half_a_step_of_the_book(implementation: str, dtype: torch.dtype) -> None:
    code, x = code_book(signed=True), numbers(3, 300).clamp(-100, 100).to(dtype)
    with testing.using(implementation):
        codes, absmax = quantize_blockwise(x, code, row_aligned=True)
        back = dequantize_blockwise(codes, absmax, code, row_aligned=True, dtype=dtype)
    assert back.dtype == dtype
    largest = absmax.repeat_interleave(256, 1)[:, :300]
    # the widest step of the signed book is 0.9 / 64
    assert ((back.float() - x.float()).abs() / largest).max() <= 0.9 / 128 + torch.finfo(dtype).eps
