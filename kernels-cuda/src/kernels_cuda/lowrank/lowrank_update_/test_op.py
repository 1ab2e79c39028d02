"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.lowrank import lowrank_update_, project_accumulate_
from kernels_cuda.lowrank.lowrank_update_ import binding, reference
from kernels_cuda.lowrank.lowrank_update_.cases import make
from kernels_cuda.lowrank.quantize_blockwise.cases import numbers

each_implementation = pytest.mark.parametrize("implementation", ["reference", *testing.implementations()])


PUBLISHED = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_keys_are_the_published_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known answers of Philox4x32-10: zeros, ones, and digits of pi (Random123)."""
    monkeypatch.setattr(reference, "ROUNDING", 0)
    assert reference.philox(0, 0, 1, torch.device("cpu")).tolist() == [PUBLISHED]


def mixed(keys: list[int], word: int) -> int:
    """The definition once more, in Python's whole numbers."""
    x = word * 0x9E3779B9 % 2**32 ^ keys[0]
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = ((x ^ x >> 15) + keys[1]) * 0x846CA68B % 2**32
    return x ^ x >> 16 ^ keys[2]


def test_an_element_is_rounded_by_its_half_of_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit below the step up to which its 16 bits reach, it stays; at the step it goes up."""
    monkeypatch.setattr(reference, "ROUNDING", 0)
    halves = [half for word in range(512) for half in (mixed(PUBLISHED, word) & 0xFFFF, mixed(PUBLISHED, word) >> 16)]
    reached = torch.tensor([0x3F800000 + 0x10000 - half for half in halves], dtype=torch.int32)
    up, one = (reference.round_at_random(bits.view(torch.float32), 0, 0) for bits in (reached, reached - 1))
    assert torch.equal(one, torch.ones(1024, dtype=torch.bfloat16))
    assert torch.equal(up, torch.full((1024,), 1 + 2.0**-7, dtype=torch.bfloat16))


def test_random_halves_are_uniform_and_unrelated() -> None:
    """Within five standard errors: each bit, and the correlation of an element with its neighbours, with the same place in the
    next group, and with itself in the next step."""
    words = reference.random_words(7, 3, 2**19, torch.device("cpu"))
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten()
    later = reference.random_words(7, 4, 2**19, torch.device("cpu"))
    error = 5 / halves.numel() ** 0.5
    for bit in range(16):
        assert abs(float((halves >> bit & 1).double().mean()) - 0.5) < error / 2, bit
    values = halves.double() / 2**16 - 0.5
    pairs = [(values[:-apart], values[apart:]) for apart in (1, 2, 3, 4, 8, 16, 64, 512, 1023, 1024, 2048)]
    pairs.append((values[::2], (later & 0xFFFF).double() / 2**16 - 0.5))
    for one, other in pairs:
        # products of two such numbers have the deviation 1 / 12
        assert abs(float((one * other).mean())) < 5 / 12 / len(one) ** 0.5


@each_implementation
def test_kernels_draw_the_bits_of_the_reference(implementation: str) -> None:
    """One third of a step tells which bits were drawn."""
    device = "cuda" if implementation == "cuda" else "cpu"
    W = torch.ones(30, 41, dtype=torch.bfloat16, device=device)
    # back(N) is 2^-8 / 3 everywhere, a third of the step above 1 - 2^-8
    P, N = torch.ones(1, 30, device=device), torch.full((1, 41), 2.0**-8 / 3, device=device)
    with testing.using(implementation):
        lowrank_update_(W, P, N, "left", 1.0, seed=11, offset=5)
    expected = reference.round_at_random(1 - torch.full((30, 41), 2.0**-8 / 3), 11, 5)
    assert torch.equal(W.cpu(), expected)
    assert 0.6 < (W == 1).float().mean() < 0.73


@each_implementation
def test_rounding_at_random_is_right_on_average(implementation: str) -> None:
    """Within four standard errors; rounding to nearest would lose the update altogether."""
    W = torch.ones(64, 64, dtype=torch.bfloat16)
    P, N = torch.ones(1, 64), torch.full((1, 64), 2.0**-11)
    with testing.using(implementation if implementation != "cuda" else "cpu"):
        lowrank_update_(W, P, N, "left", 1.0, seed=0, offset=1)
        nearest = torch.ones(64, 64, dtype=torch.bfloat16)
        lowrank_update_(nearest, P, N, "left", 1.0)
    step, probability = 2.0**-8, 2.0**-11 / 2.0**-8
    error = (1 - W.double()).mean() - 2.0**-11
    assert abs(error) <= 4 * step * (probability * (1 - probability) / 64**2) ** 0.5
    assert torch.equal(nearest, torch.ones_like(nearest))


@each_implementation
def test_infinite_and_nan_stay_what_they_are(implementation: str) -> None:
    W = torch.tensor([[torch.inf, -torch.inf, torch.nan, 3.3e38]], dtype=torch.bfloat16)
    with testing.using(implementation if implementation != "cuda" else "cpu"):
        lowrank_update_(W, torch.zeros(1, 1), torch.zeros(1, 4), "left", 1.0, seed=1)
    assert W[0, :2].tolist() == [torch.inf, -torch.inf]
    assert W[0, 2].isnan()
    assert W[0, 3].isfinite()


@pytest.mark.parametrize("implementation", ["cpu", "emulated"])
def test_a_float32_weight_takes_a_product_of_bfloat16_numbers(implementation: str) -> None:
    """Which is rounded to bfloat16 before it is added."""
    arguments = make(torch.float32, 12, 31, 5, basis=torch.bfloat16)
    arguments["N"] = arguments["N"].bfloat16()
    back = (arguments["P"].double().t() @ arguments["N"].double()).float()
    with testing.using(implementation):
        found = testing.results(lowrank_update_, arguments)["W"]
    torch.testing.assert_close(found, 0.99 * arguments["W"] - 0.1 * back, rtol=0, atol=2.0**-8 * 0.1 * float(back.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_slices_of_rows_change_nothing(side: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(dtype, 50, 37, 6, side, seed=4, basis=torch.float32)
    with testing.using("cpu"):
        whole = testing.results(lowrank_update_, arguments)["W"]
        monkeypatch.setattr(binding, "SLICE_BYTES", {"cpu": 4 * 37 * 7})
        sliced = testing.results(lowrank_update_, arguments)["W"]
    # products of fewer rows may differ in the last bit of float32, and then round elsewhere
    torch.testing.assert_close(sliced, whole, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert (sliced != whole).float().mean() < 0.01


# one, fewer than a vector, odd sums, several tiles and parts of a sum, tails in every direction
SIZES = [(1, 1, 1), (5, 7, 3), (17, 130, 9), (33, 50, 385), (8, 48, 641), (129, 200, 37)]


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("basis", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
def test_projection_is_the_product_in_float64(gradient: torch.dtype, basis: torch.dtype, side: str, implementation: str) -> None:
    """Of numbers in the basis's type, summed in float32 (rounded once to bfloat16 where the processor has no such product)."""
    for r, d, k in SIZES:
        rows, columns = (k, d) if side == "left" else (d, k)
        for G in (numbers(rows, columns, seed=1).to(gradient), numbers(columns, rows, seed=1).to(gradient).t()):
            P, L = numbers(r, k, seed=2).to(basis), numbers(r, d, seed=3)
            taken = G.to(basis).double()
            product = P.double() @ (taken if side == "left" else taken.t())
            for beta in (0.0, 1.0, 0.5):
                found = L.clone() if beta else torch.full_like(L, torch.nan)
                with testing.using(implementation):
                    project_accumulate_(found, G, P, side, beta)
                expected = product + beta * L.double()
                exact = basis == torch.float32 or implementation == "reference" or (binding.products() == 2 and beta != 0.5)
                allowed = (1e-5 if exact else 2**-8) * float(product.abs().max() + 1)
                assert float((found - expected).abs().max()) <= allowed, (r, d, k, beta)


def test_projection_refuses_by_name() -> None:
    for changed, message in (
        ({"L": torch.ones(2, 6).bfloat16()}, "L: torch.bfloat16 is not supported"),
        ({"P": torch.ones(2, 5)}, "P: shape .* has k = 5"),
        ({"side": "full"}, "side: 'full' is not known"),
    ):
        arguments = {"L": torch.ones(2, 6), "G": torch.ones(4, 6), "P": torch.ones(2, 4), "side": "left", **changed}
        with pytest.raises(ValueError, match=message):
            project_accumulate_(**arguments)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_update_of_any_size_is_the_product_in_float64(side: str, dtype: torch.dtype, halves: bool) -> None:
    for r, n, m in SIZES:
        arguments = make(dtype, m, n, r, side, basis=torch.bfloat16 if halves else torch.float32)
        P, N = arguments["P"], arguments["N"].bfloat16() if halves else arguments["N"]
        back = (P.t() if side == "left" else N.t()).double() @ (N if side == "left" else P).double()
        expected = 0.99 * arguments["W"].double() - 0.1 * back
        with testing.using("cpu"):
            found = testing.results(lowrank_update_, {**arguments, "N": N})["W"]
        allowed = (2**-8 if halves or dtype == torch.bfloat16 else 1e-5) * float(expected.abs().max() + 0.1 * back.abs().max())
        assert float((found - expected).abs().max()) <= allowed, (r, n, m)
