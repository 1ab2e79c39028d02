"""Sums over processes in flat float32 buckets that are under way while other work goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

BUCKET_BYTES = 25_000_000

Part = tuple[nn.Parameter, Tensor]


def buckets(parameters: list[nn.Parameter], size: Callable[[nn.Parameter], int]) -> Iterator[list[nn.Parameter]]:
    """`parameters` in order, in lists of about BUCKET_BYTES of float32."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if 4 * sum(size(p) for p in bucket) >= BUCKET_BYTES:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


class Exchange:
    """Tensors that come one by one, in the same order on every rank, and leave as their sums.

    Two buckets live at most: one that fills, and one under way. `places` numbers the parameters; the numbers travel along, so
    that ranks whose tensors came in different orders find out.
    """

    def __init__(self, places: dict[nn.Parameter, int], device: torch.device, group: torch_dist.ProcessGroup | None, world: int) -> None:
        self.places, self.device, self.group, self.world = places, device, group, world
        self.waiting: list[Part] = []
        self.sent: tuple[list[Part], Tensor, torch_dist.Work] | None = None

    def add(self, parameter: nn.Parameter, tensor: Tensor) -> list[Part]:
        """Take a tensor that belongs to `parameter`, and give back the sums of earlier ones if a bucket is full."""
        self.waiting.append((parameter, tensor))
        if 4 * sum(part.numel() for _, part in self.waiting) < BUCKET_BYTES:
            return []
        done = self._collect()
        self._send()
        return done

    def flush(self) -> list[Part]:
        """The sums of all tensors that have not come back."""
        done = self._collect()
        self._send()
        return done + self._collect()

    def _send(self) -> None:
        if self.waiting:
            order = torch.tensor([float(self.places[p]) for p, _ in self.waiting], device=self.device)
            flat = torch.cat([order, *(part.flatten().float() for _, part in self.waiting)])
            work = torch_dist.all_reduce(flat, group=self.group, async_op=True)
            assert work is not None
            self.sent = self.waiting, flat, work
            self.waiting = []

    def _collect(self) -> list[Part]:
        if self.sent is None:
            return []
        parts, flat, work = self.sent
        self.sent = None
        work.wait()
        order, *totals = flat.split([len(parts), *(part.numel() for _, part in parts)])
        assert order.tolist() == [self.world * self.places[p] for p, _ in parts], "gradients arrived in different orders on two ranks"
        return [(p, part.copy_(total.view_as(part))) for (p, part), total in zip(parts, totals, strict=True)]
