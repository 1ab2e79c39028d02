"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.mdm import reveal_tokens
from kernels_cuda.mdm.noise_tokens.reference import philox
from kernels_cuda.mdm.reveal_tokens.reference import _uniform

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


def drawn(implementation: str, logits: torch.Tensor, rows: int, **changes: Any) -> torch.Tensor:
    """Tokens of many samples of one row."""
    device = "cuda" if implementation == "cuda" else "cpu"
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **changes}
    many = logits.expand(rows, -1).to(device)
    with testing.using(implementation):
        address = torch.arange(rows, device=device)
        return reveal_tokens(many, logits.shape[-1], **settings, key=3, stream=5, slot=address, pos=torch.zeros_like(address))[0].cpu()


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}])
def test_shares_of_drawn_tokens_are_their_probabilities(changes: dict[str, Any]) -> None:
    """By the definition in words: sort, cut, scale to one; a chi-square beside its 99.99 % point."""
    p = (torch.tensor([0.4, 1.5, -1.0, 1.0, 0.0], dtype=torch.float64) / changes.get("temperature", 1.0)).softmax(0)
    kept: list[int] = []
    for token in sorted(range(5), key=lambda i: -float(p[i])):
        if len(kept) < changes.get("top_k", 5) and sum(float(p[i]) for i in kept) < changes.get("top_p", 1.0):
            kept.append(token)
    rows = 4000
    found = drawn("cpu", torch.tensor([0.4, 1.5, -1.0, 1.0, 0.0]), rows, **changes).bincount(minlength=5)
    expected = torch.tensor([float(p[i]) if i in kept else 0.0 for i in range(5)])
    expected *= rows / expected.sum()
    assert all(int(found[i]) == 0 for i in range(5) if i not in kept)
    chi_square = sum(float((found[i] - expected[i]) ** 2 / expected[i]) for i in kept)
    assert chi_square < {2: 15.14, 3: 18.42, 4: 21.11, 5: 23.51}[len(kept)]


@each_implementation
def test_ties_go_to_the_lowest_id(implementation: str) -> None:
    logits = torch.zeros(1, 1400)
    logits[0, [900, 700, 1300]] = 2.0
    assert drawn(implementation, logits, 2, temperature=0.0).tolist() == [700, 700]
    assert drawn(implementation, logits, 12, top_k=2).unique().tolist() == [700, 900]


def test_a_draw_has_53_bits_of_the_first_two_lanes_of_its_word() -> None:
    slot, pos = torch.arange(200), torch.full((200,), 7)
    first, second, *_ = philox(slot, pos, 5, -3)
    expected = [((int(a) >> 5) * 2**26 + (int(b) >> 6)) / 2**53 for a, b in zip(first, second)]
    assert _uniform(-3, 5, slot, pos).tolist() == expected
    assert len({value * 2**24 % 1 for value in expected}) > 190


@each_implementation
def test_a_token_depends_on_its_row_and_its_address_alone(implementation: str) -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    device = "cuda" if implementation == "cuda" else "cpu"
    slot, pos = torch.arange(6, device=device), torch.tensor([0, 0, 1, 1, 2**31 - 1, 5], device=device)

    def tokens(rows: list[int], key: int = 3, stream: int = 5) -> list[int]:
        with testing.using(implementation):
            return reveal_tokens(logits[rows].to(device), 40, 1.0, 0, 1.0, key, stream, slot[rows], pos[rows])[0].tolist()

    whole = tokens(list(range(6)))
    assert tokens([4, 1]) == [whole[4], whole[1]]
    assert tokens(list(range(6)), key=4) != whole
    assert tokens(list(range(6)), stream=6) != whole
