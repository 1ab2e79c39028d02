"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.beacon import rope_evict_, rope_gather_append_
from kernels_cuda.beacon.rope_evict_.cases import make


@pytest.mark.parametrize("implementation", testing.implementations())
def test_what_stays_is_what_would_have_been_written_there(implementation: str) -> None:
    device = "cuda" if implementation == "cuda" else "cpu"
    given = testing.moved(make(torch.float64, 2, 20, 8, [(0, 0, 0)]), device=device)
    tables = given["cos"], given["sin"]
    keys = torch.randn(1, 2, 20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)

    def written(entries: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        memory = torch.zeros_like(keys), torch.zeros_like(keys)
        rope_gather_append_(keys, keys, torch.tensor([entries], device=device), *tables, *memory, given["mem_len"].clone())
        return memory

    with testing.using(implementation):
        found, length = written(list(range(18))), torch.full((1,), 18, dtype=torch.int32, device=device)
        number = {"first": given["first"] + 2, "count": given["count"] + 5}
        rope_evict_(*found, length, **number, cos=tables[0], sin=tables[1])
        expected = written([0, 1, *range(7, 18)])
    assert int(length) == 13
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[:, :, :13], other[:, :, :13], rtol=1e-12, atol=1e-12)
