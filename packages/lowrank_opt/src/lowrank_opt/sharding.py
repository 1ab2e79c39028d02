"""Matrices whose rows are shared out over processes (FSDP2), and bases that all of these have in common.

A process has some rows of the gradient G and, of L = P G^T (r x d), the columns of these rows: moments and updates need nobody else.
A basis needs the sum over processes of G^T G (k x k), or of G^T (G Q) in the randomised methods. torch.distributed is imported only
where a tensor comes from it.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_opt.base import is_shared, share
from lowrank_opt.projector import Draw, canonical_sign, gram_matrix, largest_magnitude, leading_eigenvectors, orth, resolve_method

log = logging.getLogger("lowrank_opt")


def by_rows(parameter: Any) -> bool:
    """Whether a DTensor is shared out by rows (its first dimension) over one group of processes."""
    (placement, *others) = parameter.placements
    return not others and bool(placement.is_shard(0))


def shares(parameter: Any) -> list[int]:
    """Rows that each process has of a DTensor; nothing for a tensor that is whole."""
    processes = parameter.device_mesh.size() if is_shared(parameter) else 0
    return [share(parameter.shape[0], processes, number) for number in range(processes)]


def full(shape: tuple[int, ...], value: float, dtype: torch.dtype, like: Any, dimension: int) -> Tensor:
    """A tensor shared out along `dimension` over the processes of the parameter `like`."""
    import torch.distributed.tensor as distributed_tensor

    placed = [distributed_tensor.Shard(dimension)]
    return distributed_tensor.full(shape, value, dtype=dtype, device_mesh=like.device_mesh, placements=placed)


def total(part: Tensor, parameter: Any) -> Tensor:
    """The sum of `part` over the processes that share `parameter`."""
    if is_shared(parameter):
        part = part.contiguous()
        torch.distributed.all_reduce(part, group=parameter.device_mesh.get_group())
    return part


def norm(part: Tensor, parameter: Any) -> Tensor:
    """Euclidean norm of what all processes have of `part`."""
    size: Tensor = torch.linalg.vector_norm(part)
    return total(size.square(), parameter).sqrt() if is_shared(parameter) else size


def largest(part: Tensor, parameter: Any) -> float:
    """The largest magnitude that any process has; inf where one of them is not finite."""
    size = largest_magnitude(part) if part.numel() else part.new_zeros(())
    size = torch.where(size.isfinite(), size, torch.inf).float()
    if is_shared(parameter):
        torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX, group=parameter.device_mesh.get_group())
    return float(size)


def basis(
    gradient: Tensor,
    parameter: Any,
    rank: int,
    method: str,
    *,
    draw: Draw,
    previous: Tensor | None,
    oversample: int,
    power_iters: int,
) -> Tensor:
    """What `projector.basis` gives for side right, from this process's rows of `gradient`: the same bits in every process.

    Exact bases, svd too, come from the summed G^T G. Every process that shares `parameter` calls it.
    """
    part = gradient.t().to(torch.promote_types(gradient.dtype, torch.float32))
    size, rows = part.shape[0], parameter.shape[0]
    scale = largest(part, parameter)
    if scale == 0:
        return torch.eye(rank, size, dtype=part.dtype, device=part.device)
    if not 1e-12 < scale < 1e12:
        # squares of such entries leave the range of float32
        part = part / scale
    method = resolve_method(method, rank, size, part.device)
    if method == "random":
        columns = orth(draw(size, rank, part.device).to(part.dtype))
    elif method in ("svd", "gram"):
        columns = eigenvectors(total(gram(part), parameter), rank)
    else:
        iterations = power_iters
        if method == "subspace" and previous is not None:
            start, iterations = previous.to(part).t(), 1
        else:
            drawn = draw(rows, min(rank + oversample, size, rows), part.device).to(part.dtype)
            start = total(part @ drawn.split(shares(parameter))[parameter.device_mesh.get_local_rank()], parameter)
        for _ in range(iterations):
            start = total(part @ (part.t() @ orth(start)), parameter)
        outer = orth(start)
        columns = outer @ eigenvectors(total(gram(outer.t() @ part), parameter), rank)
    found = canonical_sign(columns.t().contiguous())
    # machines of several kinds may differ in the last bit
    torch.distributed.broadcast(found, group=parameter.device_mesh.get_group(), group_src=0)
    return found


def gram(matrix: Tensor) -> Tensor:
    """A A^T (lower triangle at least), of zeros for a process without columns."""
    return gram_matrix(matrix) if matrix.numel() else matrix.new_zeros(len(matrix), len(matrix))


def eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """`leading_eigenvectors`, in float64 where float32 fails; no process waits for another here."""
    try:
        found = leading_eigenvectors(symmetric.clone(), rank)
        if bool(found.isfinite().all()):
            return found
        why = "it is not finite"
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        why = str(error)
    log.warning("basis from a %s x %s gram matrix failed (%s); trying float64", *symmetric.shape, why)
    vectors: Tensor = torch.linalg.eigh(symmetric.double().cpu(), UPLO="L")[1]
    return vectors[:, -rank:].flip(1).to(symmetric)
