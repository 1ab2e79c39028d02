"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.mdm import masked_count
from kernels_cuda.mdm.noise_fixed_count.cases import make
from kernels_cuda.mdm.noise_tokens.reference import words

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


@each_implementation
def test_every_set_of_k_tokens_is_equally_likely(implementation: str) -> None:
    # the emulation has a fiber for each of 512 threads of a sequence
    device, rows = "cuda" if implementation == "cuda" else "cpu", 80 if implementation == "emulated" else 3000
    eligible = torch.tensor([True, True, False, True, True, True], device=device).repeat(rows, 1)
    k, slot = torch.full((rows,), 2, dtype=torch.int32, device=device), torch.arange(rows, device=device)
    with testing.using(implementation):
        masked = masked_count(k, 5, 0, slot, 6, eligible)
    seen = Counter(tuple(row.nonzero()[:, 0].tolist()) for row in masked)
    sets = list(itertools.combinations((0, 1, 3, 4, 5), 2))
    assert set(seen) == set(sets)
    # chi-square with 9 degrees of freedom is above 27.9 once in a thousand
    expected = rows / len(sets)
    assert sum((seen[each] - expected) ** 2 / expected for each in sets) < 27.9


@each_implementation
def test_a_mask_depends_on_its_address_alone_and_grows_with_k(implementation: str) -> None:
    device = "cuda" if implementation == "cuda" else "cpu"
    slot, k = torch.arange(8, device=device), torch.arange(8, dtype=torch.int32, device=device)
    with testing.using(implementation):
        whole = masked_count(k, 5, 0, slot, 61)
        assert torch.equal(masked_count(k[3:5], 5, 0, slot[3:5], 61), whole[3:5])
        assert bool((masked_count(k + 3, 5, 0, slot, 61) >= whole).all())
    assert whole.sum(1).tolist() == k.tolist()


def test_the_case_of_equal_draws_has_them() -> None:
    given = make(torch.float32, 3, 3000)
    draws = words(given["key"], given["stream"], torch.tensor([40]), 3000)[0].sort().values
    assert draws[2813] == draws[2814]
