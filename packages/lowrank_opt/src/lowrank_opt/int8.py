"""Linear layers whose weight is kept in 8 bits: a code per entry, and a step and an offset (float16) for every 256 of them.

The weight is written out where a product needs it, in the forward pass and again in the backward pass, and forgotten. What an
optimizer sees is a parameter with the weight's shape and gradient, but without values; `QGaLoreAdamW8bit` updates the codes.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lm_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowrank_opt.base import Rounding

GROUP = 256
# entries per pass, a multiple of GROUP; Rounding has random numbers for as many
CHUNK = 1 << 18
# a grid reaches this part of a group's range further at both ends, so that it lasts for many updates
MARGIN = 1 / 32
# float16 rounds by less than this part of a number; its smallest one
PRECISION, SMALLEST = 2**-10, 2**-24


def weight_bytes(elements: int) -> int:
    """Bytes of a weight in 8 bits: codes, and 4 for every group."""
    return elements + 4 * math.ceil(elements / GROUP)


def pieces(elements: int) -> Iterator[tuple[slice, slice]]:
    """Slices of a flat weight and of its groups: many whole groups at a time, a short last one alone.

    >>> list(pieces(600))
    [(slice(0, 512, None), slice(0, 2, None)), (slice(512, 600, None), slice(2, 3, None))]
    """
    whole = elements // GROUP * GROUP
    for start in range(0, whole, CHUNK):
        stop = min(start + CHUNK, whole)
        yield slice(start, stop), slice(start // GROUP, stop // GROUP)
    if whole < elements:
        yield slice(whole, elements), slice(whole // GROUP, whole // GROUP + 1)


def dequantised(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * code + zero, in float32 and then in `dtype`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if out.is_meta:
        return out
    for part, groups in pieces(codes.numel()):
        steps, offsets = (one[groups].float().unsqueeze(1) for one in (scale, zero))
        out.view(-1)[part] = (codes.view(-1)[part].view(len(steps), -1) * steps).add_(offsets).view(-1)
    return out


@torch.no_grad()
def quantise(weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, rounding: Rounding | None) -> None:
    """Write `weight` (float32, contiguous) into codes: the nearest ones, or one of the two neighbours at random.

    A group keeps its steps and offset while its entries lie between them and fill at least a quarter: an entry that does not change
    then keeps its code, whatever is drawn.
    """
    for part, groups in pieces(weight.numel()):
        values = weight.view(-1)[part].view(groups.stop - groups.start, -1)
        low, high = values.aminmax(dim=1)
        step, offset = scale[groups].float(), zero[groups].float()
        room = MARGIN * (high - low)
        new_offset = low - room
        new_offset = (new_offset - PRECISION * new_offset.abs()).half()
        new_step = ((high + room - new_offset.float()) / 255 * (1 + PRECISION)).clamp_min(SMALLEST).half()
        stale = (step == 0) | (low < offset) | (high > offset + 255 * step) | (4 * (high - low) < 255 * step)
        scale[groups] = torch.where(stale, new_step, scale[groups])
        zero[groups] = torch.where(stale, new_offset, zero[groups])
        at = (values - zero[groups].float().unsqueeze(1)) / scale[groups].float().unsqueeze(1)
        if rounding is None:
            at.round_()
        else:
            at.add_(rounding.words(at.numel()).view(at.shape) * 2.0**-16).floor_()
        codes.view(-1)[part] = at.clamp_(0, 255).to(torch.uint8).view(-1)


class Int8Weight(nn.Parameter):
    """Stands for the weight of an `Int8Linear`: its shape, type and gradient, in the memory of one entry."""

    layer: Callable[[], Int8Linear | None]

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Weight:
        return cast(Int8Weight, memo.setdefault(id(self), Int8Weight(empty(self), requires_grad=self.requires_grad)))


class Product(torch.autograd.Function):
    """x W^T for a W in codes, with a gradient for the parameter that stands for W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes, scale, zero)
        ctx.dtype = weight.dtype
        return x @ dequantised(codes, scale, zero, x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scale, zero = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = out @ dequantised(codes, scale, zero, out.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (out.reshape(-1, out.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).to(ctx.dtype)
        return of_x, of_weight, None, None, None


class Int8Linear(nn.Linear):
    """A linear layer with its weight in codes, which its state dict holds as `weight_q`, `weight_scale` and `weight_zero`."""

    weight_q: Tensor
    weight_scale: Tensor
    weight_zero: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.bias = linear.bias
        weight = linear.weight.detach()
        groups = math.ceil(weight.numel() / GROUP)
        self.register_buffer("weight_q", torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device))
        for name in ("weight_scale", "weight_zero"):
            self.register_buffer(name, torch.zeros(groups, dtype=torch.float16, device=weight.device))
        self.weight = Int8Weight(empty(weight), requires_grad=linear.weight.requires_grad)
        self.weight.layer = weakref.ref(self)
        if not weight.is_meta:
            self.store(weight.float().contiguous(), None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # of a copy
        cast(Int8Weight, self.weight).layer = weakref.ref(self)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole weight."""
        return dequantised(self.weight_q, self.weight_scale, self.weight_zero, dtype)

    def store(self, weight: Tensor, rounding: Rounding | None) -> None:
        """Take over a weight (float32)."""
        quantise(weight, self.weight_q, self.weight_scale, self.weight_zero, rounding)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        out = cast(Tensor, Product.apply(input.to(dtype), self.weight, self.weight_q, self.weight_scale, self.weight_zero))  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # elsewhere it has got memory for all its entries
        self.weight.data = empty(self.weight)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        weight = self._parameters.pop("weight")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._parameters["weight"] = weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        weight = self._parameters.pop("weight")
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._parameters["weight"] = weight


def empty(like: Tensor) -> Tensor:
    """A tensor like `like` in the memory of one entry, which must not be written to."""
    return torch.zeros((1,) * like.ndim, dtype=like.dtype, device=like.device).expand(like.shape)


def to_int8(model: nn.Module, names: Iterable[str]) -> None:
    """Keep the weights called `names` in 8 bits from now on. Raises ConfigError for one that is not of a linear layer alone."""
    users: Counter[Tensor] = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    for name in names:
        place, _, kind = name.rpartition(".")
        layer = model.get_submodule(place)
        if type(layer) is not nn.Linear or kind != "weight" or users[layer.weight] > 1:
            raise ConfigError(
                f"weight_dtype: {name} is no weight of a linear layer alone ({type(layer).__name__}), and others are not kept in 8 bits; "
                "exclude it with exclude_modules, or use weight_dtype param"
            )
        outer, _, inner = place.rpartition(".")
        setattr(model.get_submodule(outer), inner, Int8Linear(layer))
    # the C library keeps what was freed in small parts, here the whole weights one by one; others than glibc have no such call
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def to_dense(model: nn.Module) -> None:
    """Make ordinary layers again of those in 8 bits, with the weights that these stand for."""
    for place, layer in [(place, part) for place, part in model.named_modules() if isinstance(part, Int8Linear)]:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.dense(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
        plain.bias = layer.bias
        outer, _, inner = place.rpartition(".")
        setattr(model.get_submodule(outer), inner, plain)
