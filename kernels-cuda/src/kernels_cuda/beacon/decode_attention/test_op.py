"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kernels_cuda import testing
from kernels_cuda.beacon import decode_attention
from kernels_cuda.beacon.decode_attention.cases import make

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


@each_implementation
@pytest.mark.parametrize("lengths", [[(300, 40)], [(290, 3), (0, 40), (7, 0)]])
def test_rows_get_what_torch_gives_for_their_keys_alone(lengths: list[tuple[int, int]], implementation: str) -> None:
    """Alone is the other oracle: a row does not depend on the others, or on how far their keys reach."""
    given = testing.moved(make(torch.float64, 6, 2, 300, 40, 16, lengths), device="cuda" if implementation == "cuda" else "cpu")
    with testing.using(implementation):
        out, _ = decode_attention(**given)
    for b, (far, near) in enumerate(lengths):
        keys, values = (torch.cat([given[f"{x}_mem"][b : b + 1, :, :far], given[f"{x}_raw"][b : b + 1, :, :near]], 2) for x in "kv")
        expected = F.scaled_dot_product_attention(given["q"][b : b + 1], keys, values, scale=given["scale"], enable_gqa=True)
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-12, atol=1e-12)


@each_implementation
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_error_in_relative_norm(dtype: torch.dtype, bound: float, implementation: str) -> None:
    given = testing.moved(make(dtype, 6, 2, 600, 90, 64, [(600, 90), (411, 7)]), device="cuda" if implementation == "cuda" else "cpu")
    with testing.using(implementation):
        found = decode_attention(**given)
    with testing.using("reference"):
        exact = decode_attention(**testing.moved(given, dtype=torch.float64))
    for one, truth in zip(found, exact, strict=True):
        assert (one - truth).norm() <= bound * truth.norm()


@each_implementation
def test_a_row_without_keys_gives_zeros_and_minus_infinity(implementation: str) -> None:
    given = testing.moved(make(torch.float32, 4, 2, 9, 5, 8, [(9, 5), (0, 0)]), device="cuda" if implementation == "cuda" else "cpu")
    with testing.using(implementation):
        out, lse = decode_attention(**given)
    assert not out[1].any()
    assert out[0].all()
    assert lse[1].tolist() == [-torch.inf] * 4
