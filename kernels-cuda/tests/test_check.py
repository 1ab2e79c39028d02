"""Messages of the argument checks: field, value, what is wrong, what to do."""

from __future__ import annotations

import doctest

import pytest
import torch

from kernels_cuda import check


def test_shapes_binds_letters_over_tensors() -> None:
    a, b = torch.ones(3, 2), torch.ones(3)
    assert check.shapes(a=(a, "ND"), b=(b, "N"), c=(None, "N")) == {"N": 3, "D": 2}
    with pytest.raises(ValueError, match=r"b: shape \(3,\) has D = 3 where a has 2; make D the same"):
        check.shapes(a=(a, "ND"), b=(b, "D"))
    with pytest.raises(ValueError, match=r"b: shape \(3,\) has 1 dimensions; pass 2: N, D"):
        check.shapes(b=(b, "ND"))


def test_dtype_device_and_words() -> None:
    a, b = torch.ones(2), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"a: torch.float32 is not supported; use float64 or bfloat16"):
        check.dtype("a", a, (torch.float64, torch.bfloat16))
    with pytest.raises(ValueError, match=r"b: dtype torch.float64 differs from a, which has torch.float32; give both the same dtype"):
        check.same("dtype", a=a, missing=None, b=b)
    with pytest.raises(ValueError, match=r"b: device meta differs from a"):
        check.same("device", a=a, b=b.to("meta"))
    with pytest.raises(ValueError, match="kind: 'x' is not known; use 'y' or 'z'"):
        check.one_of("kind", "x", ("y", "z"))


def test_examples_run() -> None:
    assert doctest.testmod(check).failed == 0
