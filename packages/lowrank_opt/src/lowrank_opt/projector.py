"""Low-rank bases of gradients, and projection onto them.

Notation: W (m x n) with gradient G, k the projected side, d the other side, r the rank. A basis P is r x k
with orthonormal rows; the low-rank gradient L is r x d (rank-major).
    right: k = n, L = P G^T        back(X) = X^T P
    left:  k = m, L = P G          back(X) = P^T X
    full:  two bases, L = P_l G P_r^T (r x r), back(X) = P_l^T X P_r
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kernels_cuda.lowrank import gaussian_, project_accumulate_
from lm_core.errors import ConfigError

log = logging.getLogger("lowrank_opt")

Side = Literal["left", "right", "full"]
PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")
# Smaller matrices take longer to be handed over than what is left out.
PARTIAL_FROM = 256
PROJ_METHODS = ("auto", "svd", "gram", "rsvd", "subspace", "random")


def side_of(shape: tuple[int, int], proj_type: str) -> Side:
    """The side that a matrix of this shape is projected on."""
    if proj_type in ("right", "left", "full"):
        return proj_type  # type: ignore[return-value]
    tall = shape[0] >= shape[1]
    return "right" if tall == (proj_type == "std") else "left"


def rank_of(rank: int | float, shape: tuple[int, int]) -> int:
    """Rank as a number: a fraction of the smaller side if `rank` is a float, and never above the smaller side.

    >>> rank_of(0.25, (512, 1376)), rank_of(128, (64, 512))
    (128, 64)
    """
    smaller = min(shape)
    return min(max(1, round(rank * smaller)) if isinstance(rank, float) else rank, smaller)


def low_shape(shape: tuple[int, int], side: Side, rank: int) -> tuple[int, int]:
    """Shape of the low-rank gradient."""
    return {"left": (rank, shape[1]), "right": (rank, shape[0]), "full": (rank, rank)}[side]


def largest_magnitude(tensor: Tensor) -> Tensor:
    """The largest magnitude, or NaN where there is one; ten times as fast as the norm of that name."""
    return torch.stack(torch.aminmax(tensor)).abs().amax()


def product_dtype(tensor: Tensor, basis: Tensor) -> torch.dtype:
    """bfloat16 times bfloat16 stays so (products are summed in float32); everything else is at least float32."""
    both = tensor.dtype == basis.dtype == torch.bfloat16
    return torch.bfloat16 if both else torch.promote_types(tensor.dtype, torch.float32)


def project(gradient: Tensor, bases: tuple[Tensor, ...], side: Side, *, halves: bool = False) -> Tensor:
    """L (r x d; r x r for side full) in float32, or float64 for a float64 gradient. With `halves`, a basis in bfloat16 means a product
    of bfloat16 numbers whatever the gradient's type; without, only if the gradient is bfloat16, too."""
    left = side != "right"
    dtype = bases[0].dtype if halves and gradient.dtype == torch.float32 else product_dtype(gradient, bases[0])
    first = bases[0].to(dtype)
    if gradient.dtype in (torch.float32, torch.bfloat16):
        low = torch.empty(len(first), gradient.shape[1 if left else 0], device=gradient.device)
        project_accumulate_(low, gradient, first, "left" if left else "right")
    else:
        low = torch.mm(first, (gradient if left else gradient.t()).to(dtype))
    return torch.mm(low, bases[1].to(low.dtype).t()) if side == "full" else low


def factors(low: Tensor, bases: tuple[Tensor, ...], side: Side) -> tuple[Tensor, Tensor]:
    """back(low) as a product of two thin matrices, m x r and r x n: the full matrix need not exist, `addmm_` takes them."""
    dtype = product_dtype(low, bases[0])
    low, first = low.to(dtype), bases[0].to(dtype)
    if side == "right":
        return low.t(), first
    return first.t(), low if side == "left" else torch.mm(low, bases[1].to(dtype))


def canonical_sign(basis: Tensor) -> Tensor:
    """The same rows with the entry of largest magnitude (the first of equals) made positive."""
    size = basis.abs()
    places = torch.arange(basis.shape[1], device=basis.device).expand_as(basis)
    first = places.masked_fill(size != size.amax(dim=1, keepdim=True), basis.shape[1]).amin(dim=1, keepdim=True)
    return torch.where(basis.gather(1, first) < 0, -basis, basis)


def cholesky_qr2(tall: Tensor) -> Tensor | None:
    """Orthonormal columns spanning those of `tall`, by two rounds of Cholesky; None where that loses orthogonality."""
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(tall.t() @ tall, upper=True)
        if int(info) != 0:
            return None
        tall = torch.linalg.solve_triangular(factor, tall, upper=True, left=False)
    unit = torch.eye(tall.shape[1], dtype=tall.dtype, device=tall.device)
    return tall if float((tall.t() @ tall - unit).abs().max()) < 1e-5 else None


def orth(tall: Tensor) -> Tensor:
    """Orthonormal columns spanning those of `tall`: QR, and on CUDA the faster CholeskyQR2 where it holds."""
    if tall.is_cuda and (fast := cholesky_qr2(tall)) is not None:
        return fast
    columns: Tensor = torch.linalg.qr(tall)[0]
    return columns


def gram_matrix(matrix: Tensor, blocks: int = 4) -> Tensor:
    """A A^T with its lower triangle filled in, which is all that `eigh` reads; above it stand zeros, or that half too."""
    size = matrix.shape[0]
    if on_lapack(matrix):
        from scipy.linalg.blas import get_blas_funcs

        # a matrix by columns as it stands, or the transpose of one by rows: nothing is copied
        array = matrix.detach().numpy()
        syrk = get_blas_funcs("syrk", dtype=array.dtype)
        upper = syrk(1.0, array) if array.flags.f_contiguous else syrk(1.0, array.T, trans=1)
        return torch.from_numpy(upper.T)
    gram = matrix.new_zeros(size, size)
    edges = [size * block // blocks for block in range(blocks + 1)]
    for start, end in itertools.pairwise(edges):
        torch.mm(matrix[start:end], matrix[:end].t(), out=gram[start:end, :end])
    return gram


def on_lapack(matrix: Tensor) -> bool:
    """Whether scipy's BLAS and LAPACK are the faster ones: they know half a product and some of the eigenvectors, which torch does not."""
    return matrix.device.type == "cpu" and len(matrix) >= PARTIAL_FROM


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """Columns: eigenvectors of the `rank` largest eigenvalues, largest first; reads the lower triangle, and may destroy it.

    Half of the vectors or fewer of a larger matrix are computed alone, which LAPACK can and torch cannot.
    """
    size = len(symmetric)
    if on_lapack(symmetric) and 2 * rank <= size:
        from scipy.linalg import eigh

        # the transpose of a row-major matrix is what LAPACK reads without a copy
        found = eigh(
            symmetric.numpy().T, lower=False, subset_by_index=(size - rank, size - 1), driver="evr", overwrite_a=True, check_finite=False
        )
        return torch.from_numpy(found[1]).flip(1)
    vectors: Tensor = torch.linalg.eigh(symmetric, UPLO="L")[1]
    return vectors[:, -rank:].flip(1)


def whole_gram(matrix: Tensor) -> Tensor:
    """A A^T, the upper triangle copied from the lower one."""
    lower = gram_matrix(matrix).tril_()
    return lower + lower.tril(-1).t()


def squares_first(size: int, other: int, width: int, iterations: int) -> bool:
    """Whether power iterations of a k x d matrix on `width` columns take fewer operations with A A^T computed once."""
    half = 0.62  # what the blocks of `gram_matrix` leave of a product
    direct = iterations * 4 * size * other * width + 2 * size * other * width + half * 2 * width**2 * other
    squared = half * 2 * size**2 * other + (iterations + 1) * 2 * size**2 * width + 2 * size * width**2
    return squared < direct


def resolve_method(method: str, rank: int, size: int, device: torch.device) -> str:
    """What "auto" stands for, given rank and projected side: the exact basis where it is affordable."""
    if method != "auto":
        return method
    affordable = 512 if device.type == "cuda" else 2048
    return "gram" if rank > size / 3 or size <= affordable else "rsvd"


Draw = Callable[[int, int, torch.device], Tensor]


def gaussian(seed: int, index: int, number: int) -> Draw:
    """Standard normal matrices (rows, columns, device) addressed by (seed, index of the parameter, number of the refresh)."""

    def draw(rows: int, columns: int, device: torch.device) -> Tensor:
        out = torch.empty(rows, columns, device=device)
        gaussian_(out, seed, index, number)
        return out

    return draw


def basis(
    gradient: Tensor,
    side: Literal["left", "right"],
    rank: int,
    method: str,
    *,
    draw: Draw,
    previous: Tensor | None = None,
    oversample: int = 16,
    power_iters: int = 2,
    canonical: bool = True,
) -> tuple[Tensor, int]:
    """A basis (r x k, float32) of the leading directions of `gradient`, and how many methods failed before one worked.

    Methods: svd, gram, rsvd, subspace (rsvd warm-started from `previous`; if that is bfloat16, products are ones of bfloat16 numbers),
    random, auto. `draw(rows, columns, device)` gives Gaussian numbers. A method that fails or returns non-finite numbers is followed by
    gram and then by a float64 SVD on the CPU, with a warning. An all-zero gradient gives unit vectors.

    Raises ConfigError for a non-finite gradient.
    """
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    matrix = (gradient if side == "left" else gradient.t()).to(dtype)
    size = matrix.shape[0]
    largest = float(largest_magnitude(gradient))
    if largest == 0:
        return torch.eye(rank, size, dtype=dtype, device=matrix.device), 0
    if not largest < torch.inf:
        raise ConfigError("gradient: it is not finite, so it has no basis; lower the learning rate or clip")
    if not 1e-12 < largest < 1e12:
        # squares of such entries leave the range of float32
        gradient, matrix = gradient / largest, matrix / largest
    method = resolve_method(method, rank, size, matrix.device)
    if method == "subspace" and previous is None:
        method = "rsvd"

    def exact() -> Tensor:
        # of the gradient as it stands, since the signs of a transposed one may differ from what others get
        left, _, right = torch.linalg.svd(matrix if side == "left" else matrix.t(), full_matrices=False)
        columns: Tensor = left if side == "left" else right.t()
        return columns[:, :rank]

    def gram() -> Tensor:
        return leading_eigenvectors(gram_matrix(matrix), rank)

    def iterate(start: Tensor, iterations: int) -> Tensor:
        # A A^T takes k^2 numbers: nothing on a CPU, while a GPU may have no room
        squared = matrix.device.type == "cpu" and squares_first(matrix.shape[0], matrix.shape[1], start.shape[1], iterations)
        square = whole_gram(matrix) if squared else None
        for _ in range(iterations):
            start = matrix @ (matrix.t() @ orth(start)) if square is None else square @ orth(start)
        columns = orth(start)
        small = gram_matrix(columns.t() @ matrix) if square is None else columns.t() @ (square @ columns)
        return torch.mm(columns, leading_eigenvectors(small, rank))

    def randomised() -> Tensor:
        width = min(rank + oversample, *matrix.shape)
        return iterate(matrix @ draw(matrix.shape[1], width, matrix.device).to(dtype), power_iters)

    def warm() -> Tensor:
        assert previous is not None
        if previous.dtype != torch.bfloat16:
            return iterate(previous.to(matrix).t(), 1)
        # a basis in bfloat16 means products of bfloat16 numbers here, too; its rows need not be made orthonormal once more
        low = project(gradient, (previous,), side, halves=True)
        columns = orth(project(gradient, (low.bfloat16(),), "right" if side == "left" else "left", halves=True).t())
        low = project(gradient, (columns.t().bfloat16(),), side, halves=True)
        return torch.mm(columns, leading_eigenvectors(gram_matrix(low), rank))

    def random() -> Tensor:
        return orth(draw(size, rank, matrix.device).to(dtype))

    def last_resort() -> Tensor:
        vectors: Tensor = torch.linalg.svd(matrix.double().cpu(), full_matrices=False)[0]
        return vectors[:, :rank].to(matrix)

    methods = {"svd": exact, "gram": gram, "rsvd": randomised, "subspace": warm, "random": random}
    attempts = [(method, methods[method]), *([("gram", gram)] if method != "gram" else []), ("float64 svd", last_resort)]
    for failures, (name, attempt) in enumerate(attempts):
        try:
            rows = attempt().t()
        except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            log.warning("basis of a %s x %s gradient by %s failed (%s); trying the next method", *gradient.shape, name, error)
            continue
        if bool(rows.isfinite().all()):
            # a copy in any case: a view would keep the whole factor alive
            return canonical_sign(rows.contiguous()) if canonical else rows.clone(memory_format=torch.contiguous_format), failures
        log.warning("basis of a %s x %s gradient by %s is not finite; trying the next method", *gradient.shape, name)
    raise AssertionError("a float64 SVD of a finite matrix cannot fail")


def transfer(first: Tensor, second: Tensor, changes: tuple[Tensor, ...], before: int, betas: tuple[float, float]) -> None:
    """Carry both moments into a new basis, in place; `before` is the number of updates they have seen.

    `changes` are C = P_new P_old^T, one per projected side. Means are rotated; variances are mixed by squares,
    as for independent coordinates.
    """
    scale1, scale2 = 1 - betas[0] ** before, 1 - betas[1] ** before
    mean, square = first / scale1, second / scale2

    def rotate(x: Tensor, turns: tuple[Tensor, ...]) -> Tensor:
        x = turns[0] @ x
        return x @ turns[1].t() if len(turns) > 1 else x

    turned = rotate(mean, changes)
    variance = rotate(square - mean * mean, tuple(c * c for c in changes))
    first.copy_(turned).mul_(scale1)
    second.copy_(variance.add_(turned * turned).abs_()).mul_(scale2)
