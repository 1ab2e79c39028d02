"""What follows the recurrence of a time mixer: normalisation of each head, bonus, gate. B batch, T time, H heads, N head size."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice
from kernels_cuda.rwkv_distill.elementwise import check_floats, check_parameters
from kernels_cuda.rwkv_distill.tmix_out import binding, reference

__all__ = ["tmix_out"]

MAX_HEAD_SIZE = 256  # as in op.h


def tmix_out(
    y: Tensor,
    r: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    r_k: Tensor | None = None,
    gn_w: Tensor | None = None,
    gn_b: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 64e-5,
) -> Tensor:
    """[B, T, H, N]: (groupnorm(y) gn_w + gn_b + (sum over n of r k r_k) v) gate, each head normalised over its N numbers.

    y, r, k, v: [B, T, H, N], float32, bfloat16 or float64 (always computed by the reference), one dtype, which the result has. gate: like y
    or [B, T, H N]. r_k, gn_w, gn_b: H N numbers in one or two dimensions, in the dtype of y or float32. N is at most 256. Without
    gn_w and gn_b y is not normalised, without r, k, v and r_k there is no bonus, without gate no gate. All tensors are differentiable.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for a part that is given in parts.

    >>> y, ones = torch.tensor([[[[1.0, 3.0]]]]), torch.ones(1, 2)
    >>> tmix_out(y, gn_w=ones, gn_b=ones, gate=2 * y, eps=0.0).flatten().tolist()
    [0.0, 12.0]
    """
    check.shapes(y=(y, "BTHN"), r=(r, "BTHN"), k=(k, "BTHN"), v=(v, "BTHN"))
    _check_parts(y, {"r": r, "k": k, "v": v, "r_k": r_k}, {"gn_w": gn_w, "gn_b": gn_b})
    check_floats(y=y, r=r, k=k, v=v, gate=gate)
    check_parameters(y, r_k=r_k, gn_w=gn_w, gn_b=gn_b)
    heads = y.shape[2:]
    if gate is not None and tuple(gate.shape) not in (tuple(y.shape), (*y.shape[:2], heads.numel())):
        check.fail("gate", f"shape {tuple(gate.shape)}", f"does not fit y of shape {tuple(y.shape)}", "make it like y, or [B, T, H N]")
    if y.dtype == torch.float64 or y.shape[3] > MAX_HEAD_SIZE or not choice.library(binding.OP, y.device.type):
        return reference.tmix_out(y, r, k, v, r_k, gn_w, gn_b, gate, eps)
    flat = [None if value is None else value.reshape(-1, *heads) for value in (y, r, k, v, gate)]
    parameters = [None if value is None else value.float().reshape(heads) for value in (r_k, gn_w, gn_b)]
    out: Tensor = binding.forward(*flat[:4], *parameters, flat[4], eps)
    return out.view(y.shape)


def _check_parts(y: Tensor, *parts: dict[str, Tensor | None]) -> None:
    """All of a part are there, or none."""
    for part in parts:
        given = [name for name, value in part.items() if value is not None]
        if given and len(given) < len(part):
            missing = next(name for name in part if name not in given)
            check.fail(missing, None, f"is missing where {given[0]} is given", f"pass all of {', '.join(part)}, or none")
    for name in ("r_k", "gn_w", "gn_b"):
        value = {**parts[0], **parts[1]}[name]
        if value is not None and tuple(value.shape) not in (tuple(y.shape[2:]), (y.shape[2:].numel(),)):
            check.fail(name, f"shape {tuple(value.shape)}", f"does not fit y of shape {tuple(y.shape)}", f"pass {tuple(y.shape[2:])}")
