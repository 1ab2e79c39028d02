from __future__ import annotations

import functools

import pytest
import torch

from lm_core.errors import ConfigError
from lowrank_opt import projector
from lowrank_opt.projector import (
    basis,
    canonical_sign,
    cholesky_qr2,
    gaussian,
    gram_matrix,
    leading_eigenvectors,
    low_shape,
    orth,
    rank_of,
    resolve_method,
    side_of,
    squares_first,
    whole_gram,
)

METHODS = ["svd", "gram", "rsvd", "subspace", "random", "auto"]
DRAW = gaussian(0, 0, 0)


def spectrum(rows, columns, power, seed=0):
    """A matrix with singular values 1, 2^-power, 3^-power, ... and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    small = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, small, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, small, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(1, small + 1, dtype=torch.float64) ** -power
    return (left * values) @ right.t()


def energy(rows, matrix):
    return float((rows.double() @ matrix.double()).square().sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (33, 33), (7, 5)])
def test_rows_are_orthonormal(method, side, shape):
    gradient = spectrum(*shape, 1.0).float()
    previous = basis(gradient, side, 4, "svd", draw=DRAW)[0]
    rows, failures = basis(gradient, side, 4, method, draw=DRAW, previous=previous)
    size = shape[0] if side == "left" else shape[1]
    assert rows.shape == (4, size)
    assert failures == 0
    torch.testing.assert_close(rows @ rows.t(), torch.eye(4), rtol=0, atol=1e-5)
    assert rows.untyped_storage().nbytes() == 4 * size * 4, "a view would keep the factor alive"


@pytest.mark.parametrize(("power", "least"), [(0.5, 0.985), (1.0, 0.999)])
def test_captured_energy_is_close_to_the_best_possible(power, least):
    gradient = spectrum(256, 683, power)
    best = float((torch.arange(1, 65, dtype=torch.float64) ** (-2 * power)).sum())
    captured = {m: energy(basis(gradient.float(), "left", 64, m, draw=DRAW)[0], gradient) / best for m in ("svd", "gram", "rsvd", "random")}
    assert captured["svd"] > 0.9999
    assert captured["gram"] > 0.9999
    assert captured["rsvd"] > least
    assert captured["random"] < 0.9


def test_subspace_improves_from_one_refresh_to_the_next():
    gradient = spectrum(64, 96, 0.5)
    rows = basis(gradient.float(), "left", 8, "random", draw=DRAW)[0]
    captured = []
    for _ in range(4):
        rows = basis(gradient.float(), "left", 8, "subspace", draw=DRAW, previous=rows)[0]
        captured.append(energy(rows, gradient))
    assert captured == sorted(captured)
    assert captured[-1] > 0.97 * float((torch.arange(1, 9, dtype=torch.float64) ** -1.0).sum())


@pytest.mark.parametrize(("side", "dtype"), [("left", torch.float32), ("right", torch.float32), ("left", torch.bfloat16)])
def test_a_basis_in_bfloat16_is_refreshed_as_well_as_one_in_float32(side, dtype):
    gradient = spectrum(96, 160, 0.5).to(dtype)
    before = basis(gradient + 0.01 * torch.randn(96, 160, generator=torch.Generator().manual_seed(0)), side, 16, "svd", draw=DRAW)[0]
    whole, halves = (basis(gradient, side, 16, "subspace", draw=DRAW, previous=p)[0] for p in (before, before.bfloat16()))
    torch.testing.assert_close(halves @ halves.t(), torch.eye(16), rtol=0, atol=1e-5)
    matrix = gradient if side == "left" else gradient.t()
    assert energy(halves, matrix) == pytest.approx(energy(whole, matrix), rel=1e-4)
    assert energy(before, matrix) < 0.98 * energy(halves, matrix)


def test_bases_span_the_leading_singular_vectors_in_float64():
    gradient = spectrum(30, 50, 1.5)
    vectors = torch.linalg.svd(gradient).U[:, :5].t()
    for method in ("svd", "gram", "rsvd"):
        rows = basis(gradient.float(), "left", 5, method, draw=DRAW)[0].double()
        torch.testing.assert_close((rows @ vectors.t()).abs(), torch.eye(5, dtype=torch.float64), rtol=0, atol=2e-3)


def test_the_largest_entry_of_every_row_is_positive():
    rows = canonical_sign(torch.tensor([[0.5, -2.0, 2.0], [-1.0, 0.0, 0.5], [0.0, 3.0, -1.0]]))
    assert rows.tolist() == [[-0.5, 2.0, -2.0], [1.0, 0.0, -0.5], [0.0, 3.0, -1.0]]


@pytest.mark.parametrize("method", ["svd", "gram", "rsvd", "subspace", "random"])
def test_signs_chosen_by_the_linear_algebra_library_do_not_matter(method, monkeypatch):
    gradient = spectrum(24, 31, 0.7).float()
    previous = basis(gradient, "left", 6, "random", draw=gaussian(0, 1, 0))[0]
    find = functools.partial(basis, gradient, "left", 6, method, draw=DRAW, previous=previous)
    plain = find()[0]
    generator = torch.Generator().manual_seed(5)

    def flipped(function, place):
        def call(*args, **kwargs):
            result = list(function(*args, **kwargs))
            result[place] = result[place] * (torch.randint(0, 2, (result[place].shape[1],), generator=generator).float() * 2 - 1)
            return result

        return call

    monkeypatch.setattr(torch.linalg, "eigh", flipped(torch.linalg.eigh, 1))
    monkeypatch.setattr(torch.linalg, "svd", flipped(torch.linalg.svd, 0))
    monkeypatch.setattr(torch.linalg, "qr", flipped(torch.linalg.qr, 0))
    assert torch.equal(find()[0], plain)


@pytest.mark.parametrize("method", METHODS)
def test_difficult_gradients_still_give_orthonormal_rows(method):
    generator = torch.Generator().manual_seed(0)
    deficient = torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    for gradient, rank in (
        (deficient, 6),
        (torch.randn(1, 1, generator=generator), 1),
        (torch.randn(1, 9, generator=generator), 1),
        (torch.randn(9, 1, generator=generator), 1),
        (deficient * 1e-30, 3),
        (deficient * 1e25, 3),
        (deficient.bfloat16(), 3),
    ):
        for side in ("left", "right"):
            rows, _ = basis(gradient, side, rank, method, draw=DRAW)
            torch.testing.assert_close(rows @ rows.t(), torch.eye(rank), rtol=0, atol=1e-5)


def test_a_zero_gradient_gives_unit_vectors_and_a_non_finite_one_is_refused():
    assert torch.equal(basis(torch.zeros(5, 7), "left", 3, "gram", draw=DRAW)[0], torch.eye(3, 5))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="not finite"):
            basis(torch.full((3, 3), value), "left", 2, "gram", draw=DRAW)


def test_a_failing_method_is_followed_by_gram_and_then_by_float64(monkeypatch, caplog):
    gradient = spectrum(16, 20, 1.0).float()
    right = basis(gradient, "left", 3, "svd", draw=DRAW)[0]
    svd = torch.linalg.svd

    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    def fails_in_float32(matrix, **kwargs):
        return svd(matrix, **kwargs) if matrix.dtype == torch.float64 else fails()

    monkeypatch.setattr(torch.linalg, "svd", fails_in_float32)
    rows, failures = basis(gradient, "left", 3, "svd", draw=DRAW)
    assert failures == 1
    torch.testing.assert_close(rows, right, rtol=0, atol=1e-4)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with caplog.at_level("WARNING"):
        rows, failures = basis(gradient, "left", 3, "svd", draw=DRAW)
    assert failures == 2
    assert "did not converge" in caplog.text
    torch.testing.assert_close(rows, right, rtol=0, atol=1e-4)


def test_cholesky_is_given_up_where_the_spectrum_falls_fast():
    generator = torch.Generator().manual_seed(0)
    tame = torch.randn(40, 8, generator=generator)
    columns = cholesky_qr2(tame)
    assert columns is not None
    torch.testing.assert_close(columns.t() @ columns, torch.eye(8), rtol=0, atol=1e-5)
    wild = spectrum(40, 8, 9.0).float()
    assert cholesky_qr2(wild) is None
    torch.testing.assert_close(orth(wild).t() @ orth(wild), torch.eye(8), rtol=0, atol=1e-5)


def test_random_bases_depend_on_their_address_alone():
    gradient = torch.randn(9, 12)
    bases = [
        basis(gradient, "left", 3, "random", draw=gaussian(*address))[0]
        for address in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert torch.equal(bases[0], bases[1])
    assert all(not torch.equal(bases[0], other) for other in bases[2:])


@torch.no_grad()
@pytest.mark.parametrize("size", [13, 260], ids=["by blocks", "by syrk"])
def test_gram_has_the_lower_triangle_of_the_product(size):
    tall = torch.randn(31, size, generator=torch.Generator().manual_seed(0))
    for matrix in (tall.t(), tall.t().contiguous(), tall.t().double(), tall.t()[:, ::2], tall.t().requires_grad_()):
        product = matrix @ matrix.t()
        torch.testing.assert_close(gram_matrix(matrix).tril(), product.tril(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(whole_gram(matrix), product, rtol=1e-5, atol=1e-5)


def test_few_eigenvectors_of_a_large_matrix_are_those_of_all():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(300, 3, generator=generator) @ torch.randn(3, 400, generator=generator)
    for matrix, rank in ((spectrum(300, 400, 0.5).float(), 40), (torch.eye(300), 5), (low, 6)):
        gram = gram_matrix(matrix)
        values = torch.linalg.eigvalsh(gram.double().tril() + gram.double().tril(-1).t()).flip(0)
        columns = leading_eigenvectors(gram.clone(), rank)
        torch.testing.assert_close(columns.t() @ columns, torch.eye(rank), rtol=0, atol=1e-5)
        caught = (columns.double().t() @ matrix.double()).square().sum(dim=1)
        torch.testing.assert_close(caught, values[:rank], rtol=1e-3, atol=1e-4 * float(values[0]))


def test_power_iterations_may_begin_with_the_square(monkeypatch):
    gradient = spectrum(48, 130, 0.5).float()
    assert squares_first(48, 130, 28, 2)
    assert not squares_first(48, 130, 4, 2)
    found = {}
    for squared in (True, False):
        monkeypatch.setattr("lowrank_opt.projector.squares_first", lambda *sizes, squared=squared: squared)
        found[squared] = basis(gradient, "left", 12, "rsvd", draw=DRAW)[0]
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=2e-4)
    torch.testing.assert_close(whole_gram(gradient), gradient @ gradient.t())


def test_sides_ranks_and_shapes():
    cases = {"std": ("right", "left", "right"), "reverse_std": ("left", "right", "left"), "left": ("left",) * 3, "right": ("right",) * 3}
    for proj_type, sides in cases.items():
        assert tuple(side_of(shape, proj_type) for shape in ((9, 4), (4, 9), (5, 5))) == sides
    assert [rank_of(rank, (8, 32)) for rank in (1, 8, 100, 0.25, 0.01)] == [1, 8, 8, 2, 1]
    assert [low_shape((8, 32), side, 3) for side in ("left", "right", "full")] == [(3, 32), (3, 8), (3, 3)]


def test_auto_takes_the_exact_basis_where_it_is_affordable():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_method("auto", 8, 2048, cpu) == "gram"
    assert resolve_method("auto", 8, 2049, cpu) == "rsvd"
    assert resolve_method("auto", 1024, 2049, cpu) == "gram"
    assert resolve_method("auto", 8, 513, cuda) == "rsvd"
    assert resolve_method("svd", 8, 4096, cpu) == "svd"


@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_projection_and_its_adjoint(side):
    gradient = torch.randn(11, 7)
    bases = {
        "left": (torch.randn(3, 11),),
        "right": (torch.randn(3, 7),),
        "full": (torch.randn(3, 11), torch.randn(3, 7)),
    }[side]
    low = projector.project(gradient, bases, side)
    left, right = projector.factors(low, bases, side)
    assert low.shape == low_shape((11, 7), side, 3)
    # <L, X> = <G, back(X)> for every X
    other = torch.randn_like(low)
    left_x, right_x = projector.factors(other, bases, side)
    torch.testing.assert_close((low * other).sum(), (gradient * (left_x @ right_x)).sum())
    assert (left @ right).shape == gradient.shape
