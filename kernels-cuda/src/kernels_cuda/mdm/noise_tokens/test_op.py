"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import math

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.mdm import masked_tokens
from kernels_cuda.mdm.noise_tokens.reference import philox

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((-1, 2**32 - 1, 2**32 - 1), -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x85A308D3243F6A88 - 2**64, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, int, int], key: int, words: tuple[int, ...]) -> None:
    index, block, stream = counter
    assert tuple(int(word) for word in philox(torch.tensor([index]), torch.tensor([block]), stream, key)) == words


@each_implementation
def test_the_share_of_masked_tokens_is_the_chance(implementation: str) -> None:
    device, size = "cuda" if implementation == "cuda" else "cpu", 20_000
    p = torch.tensor([0.001, 0.3, 0.9], device=device)
    with testing.using(implementation):
        share = masked_tokens(p, 5, 0, torch.arange(3, device=device), size).double().mean(1)
    for found, chance in zip(share.tolist(), p.tolist(), strict=True):
        assert abs(found - chance) < 4 * math.sqrt(chance * (1 - chance) / size)


@each_implementation
def test_a_mask_depends_on_its_address_alone(implementation: str) -> None:
    device = "cuda" if implementation == "cuda" else "cpu"
    slot, p = torch.arange(8, device=device), torch.full((8,), 0.5, device=device)
    with testing.using(implementation):
        whole = masked_tokens(p, 5, 0, slot, 61)
        assert torch.equal(masked_tokens(p[3:5], 5, 0, slot[3:5], 61), whole[3:5])
        # a longer sequence begins like the shorter one
        assert torch.equal(masked_tokens(p, 5, 0, slot, 100)[:, :61], whole)
        # a larger chance only adds masks
        assert bool((masked_tokens(p + 0.2, 5, 0, slot, 61) >= whole).all())
        assert not torch.equal(masked_tokens(p, 6, 0, slot, 61), whole)
        assert not torch.equal(masked_tokens(p, 5, 1, slot, 61), whole)
