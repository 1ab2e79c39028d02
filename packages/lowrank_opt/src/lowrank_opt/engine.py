"""Engines of this package: replicas that are compared now and then, and replicas that exchange L instead of gradients."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from lm_core import dist
from lm_core.engine.replicated import Replicated
from lm_core.errors import RunFailed
from lowrank_opt.base import Group, work_dtype
from lowrank_opt.exchange import Exchange, buckets
from lowrank_opt.galore import GaLoreAdamW
from lowrank_opt.optimizer_options import PROJECTED
from lowrank_opt.projector import largest_magnitude

if TYPE_CHECKING:
    from pathlib import Path

    from lowrank_opt.config import TrainConfig
    from lowrank_opt.method import LowRank

log = logging.getLogger("lowrank_opt")


class Replicas(Replicated):
    """The replicated engine, and what several processes can do beside it.

    A basis is computed by one process and handed to the others: the cost of refreshes is divided, and bases are the same on every rank,
    whatever its linear algebra. With `shard_optimizer` every parameter has an owner, which alone keeps its state and updates it, and
    then hands the weight to the others; checkpoints hold the whole state, for any number of processes. Every `verify_replicas_every`
    updates all ranks must hold the same weights and bases.
    """

    # whether every process needs the bases of parameters that others own
    keeps_bases = False

    # what GaLore's optimizers add to the others is asked of their matrices only
    optimizer: GaLoreAdamW

    def __init__(self, config: TrainConfig, method: LowRank, model: nn.Module, device: torch.device) -> None:
        super().__init__(config, method, model, device)
        self.every, self.updates = config.verify_replicas_every, 0
        self.owners: dict[nn.Parameter, int] = {}
        self.projected = []
        if config.optimizer in PROJECTED and self.data_world > 1 and (self.keeps_bases or not config.shard_optimizer):
            groups = self.optimizer.param_groups
            self.projected = [
                p for group in groups for p in group["params"] if group["compat"] == "none" and self.optimizer._is_matrix(group, p)
            ]
            self.optimizer.register_step_pre_hook(lambda *_: self._share_refreshes(self.projected))
        if config.shard_optimizer:
            whole = self.optimizer.predicted_state_bytes()
            self.optimizer.keeps_bases = self.keeps_bases
            self.owners = owners(list(self.trained.values()), self._bytes_of_owner, self.data_world)
            self.optimizer.owned = frozenset(p for p, owner in self.owners.items() if owner == self.data_rank)
            log.info("optimizer state of this process: %s of %s bytes", f"{self.optimizer.predicted_state_bytes():,}", f"{whole:,}")
            self.optimizer.register_step_pre_hook(lambda *_: self._leave_to_owners())
            self.optimizer.register_step_post_hook(lambda *_: self._take_from_owners())

    @torch.no_grad()
    def _share_refreshes(self, parameters: Sequence[nn.Parameter]) -> None:
        """The new bases of this step: matrix i's by rank i mod world, then one broadcast for each."""
        due = [p for p in parameters if p.grad is not None and self.optimizer.refresh_is_due(p)]
        # without a basis there is nothing to share: the optimizer keeps the old one, or refuses the gradient by name
        due = [p for p in due if p.grad is not None and 0 < float(largest_magnitude(p.grad)) < torch.inf]
        sources = {p: self.optimizer._address(p).index % self.data_world for p in due}
        mine = {p: self.optimizer.find_bases(p) for p in due if sources[p] == self.data_rank}
        for parameter in due:
            shapes = self.optimizer._basis_shapes(self.optimizer._group_of(parameter), parameter).values()
            bases = mine.get(parameter) or tuple(parameter.new_empty(shape, dtype=work_dtype(parameter.dtype)) for shape in shapes)
            for basis in bases:
                torch_dist.broadcast(basis, src=sources[parameter])
            self.optimizer.found[parameter] = bases

    def _bytes_of_owner(self, parameter: nn.Parameter) -> int:
        """State that the owner of a parameter alone has."""
        return self.optimizer.predicted_bytes_of(parameter, "exp_avg" if self.keeps_bases else "")

    def _leave_to_owners(self) -> None:
        for parameter in self.owners:
            if not self.optimizer.owns(parameter):
                parameter.grad = None

    def _take_from_owners(self) -> None:
        if self.data_world == 1:
            return
        # as bytes, since not every backend knows every dtype
        parts = [(p.detach(), p.detach().contiguous().view(-1).view(torch.uint8), owner) for p, owner in self.owners.items()]
        for work in [torch_dist.broadcast(part, src=owner, async_op=True) for _, part, owner in parts]:
            work.wait()
        for weight, part, _ in parts:
            if not weight.is_contiguous():
                weight.copy_(part.view(weight.dtype).view(weight.shape))
        counts = {p: state.get("refreshes", 0) for p, state in self.optimizer.state.items()}
        owned = sum(count for p, count in counts.items() if self.optimizer.owns(p))
        self.optimizer.refreshes_elsewhere = int(dist.all_sum(torch.tensor(owned), self)) - sum(counts.values())

    def _whole_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        own = dict(self.optimizer.state)
        if self.data_world > 1:
            for parameter, owner in self.owners.items():
                # one at a time; all but the first rank let go of it again
                kept = self.optimizer.state.get(parameter, {}) if owner == self.data_rank else {}
                box = [{key: value.cpu() if isinstance(value, Tensor) else value for key, value in kept.items()}]
                torch_dist.broadcast_object_list(box, src=owner, device=torch.device("cpu"))
                if self.data_rank == 0 and owner and box[0]:
                    self.optimizer.state[parameter] = box[0]
        found = super()._whole_state()
        for parameter in self.owners.keys() - own.keys():
            self.optimizer.state.pop(parameter, None)
        self.optimizer.state.update(own)
        return found

    def load(self, folder: Path) -> None:
        super().load(folder)
        for parameter in self.owners:
            if not self.optimizer.owns(parameter):
                self._drop_foreign(parameter)

    def _drop_foreign(self, parameter: nn.Parameter) -> None:
        """Forget the state of a parameter that another process owns."""
        self.optimizer.state.pop(parameter, None)

    def step(self) -> float | None:
        norm = super().step()
        self.count_update()
        return norm

    def count_update(self) -> None:
        """Compare the replicas if it is time."""
        self.updates += 1
        if self.every and self.updates % self.every == 0:
            verify_replicas(self.trained, self.optimizer)


class LowRankReduction(Replicas):
    """Data parallelism in which a matrix with a basis costs r x d numbers per update, and its gradient is freed inside backward.

    Every rank projects its own gradient with the common basis, which is linear: the sum of L over micro-batches and ranks is L of the
    summed gradient. Whole gradients are kept and summed for parameters without a rank, and for matrices whose basis is due for a
    refresh in this update. Gradient norm and clipping are those of L and of the whole gradients. With `shard_optimizer` every process
    has all bases, since it projects with them, and the moments of its own parameters. With `per_layer` sums are exchanged and weights
    updated inside backward, and a due basis comes from the first micro-batch of all ranks.
    """

    keeps_bases = True

    def __init__(self, config: TrainConfig, method: LowRank, model: nn.Module, device: torch.device) -> None:
        super().__init__(config, method, model, device)
        self.places = {p: number for number, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        self.matrices = [p for p in self.trained.values() if self.optimizer._accumulates_low(self._group(p), p)]
        self.low: dict[Tensor, Tensor] = {}
        self.optimizer.grad_norm_kind = "projected" if self.matrices else "full"
        if not self.per_layer:
            for parameter in self.matrices:
                parameter.register_post_accumulate_grad_hook(self._arrived)
        elif self.data_world > 1:
            assert self.optimizer._layers is not None
            places = {parameter: place for place, parameter in enumerate(self.trained.values())}
            self.optimizer._layers.exchange = Exchange(places, self.device, self.data_group, self.data_world)
            self.optimizer._layers.begin = self._begin_together

    def _check_per_layer(self) -> None:
        """Nothing to refuse: options were checked, and several processes sum what the updates need."""

    def _group(self, parameter: Tensor) -> Group:
        # looked up each time: loading a state replaces the groups
        return self.optimizer.param_groups[self.places[parameter]]

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        if self.optimizer.refresh_is_due(parameter):
            return
        low = self.optimizer._accumulate_low(self._group(parameter), parameter)
        self.low[parameter] = self.low[parameter].add_(low) if parameter in self.low else low
        parameter.grad = None

    def _begin_together(self, group: Group, parameter: nn.Parameter) -> None:
        """Begin the step of a matrix, with a basis from the gradient of all ranks if one is due."""
        own = parameter.grad
        assert own is not None
        if self.optimizer.refresh_is_due(parameter):
            total = own.to(torch.float32, copy=True)
            torch_dist.all_reduce(total, group=self.data_group)
            parameter.grad = total.to(own.dtype)
            self._share_refreshes([parameter])
        self.optimizer._begin_low(group, parameter)
        parameter.grad = own

    def _summed_whole(self) -> list[nn.Parameter]:
        projected = {p for p in self.matrices if not self.optimizer.refresh_is_due(p)}
        return [p for p in self.trained.values() if p not in projected]

    @torch.no_grad()
    def step(self) -> float | None:
        if self.per_layer:
            return super().step()
        due = [p for p in self.matrices if self.optimizer.refresh_is_due(p)]
        self._reduce()
        self._share_refreshes(self.projected)
        self._sum_low([p for p in self.matrices if p not in set(due)])
        for parameter in [p for p in due if p.grad is not None]:
            self.optimizer._begin_low(self._group(parameter), parameter)
            self.low[parameter] = self.optimizer._accumulate_low(self._group(parameter), parameter)
            parameter.grad = None
        sums = {name: self.low.get(p, p.grad) for name, p in self.trained.items()}
        found = {name: total for name, total in sums.items() if total is not None}
        norm = self._norm(list(found.values()))
        if not math.isfinite(norm):
            name = next((name for name, total in found.items() if not bool(total.isfinite().all())), "none (the squares overflow)")
            raise RunFailed(
                f"gradient: the norm is {norm}; first parameter with a non-finite gradient: {name}; resume from the last checkpoint "
                "with a lower --lr"
            )
        if 0 < self.clip < norm:
            torch._foreach_mul_(list(found.values()), self.clip / (norm + 1e-6))
        for matrix, low in self.low.items():
            if self.optimizer.owns(matrix):
                self.optimizer._apply(self._group(matrix), matrix, low)
        # what is left has its gradient
        self.optimizer.step()
        self._forget()
        self.count_update()
        return norm

    def _sum_low(self, parameters: list[nn.Parameter]) -> None:
        """Sum L over ranks in flat float32 buckets, all under way at once, and count the step of every matrix that any rank used."""
        reductions = []
        for bucket in buckets(parameters, lambda p: math.prod(self.optimizer._low_shape(self._group(p), p))):
            shapes = [self.optimizer._low_shape(self._group(p), p) for p in bucket]
            parts = [self.low[p].flatten().float() if p in self.low else torch.zeros(math.prod(s)) for p, s in zip(bucket, shapes)]
            used = torch.tensor([float(p in self.low) for p in bucket])
            flat = torch.cat([part.to(self.device) for part in (used, *parts)])
            work = torch_dist.all_reduce(flat, group=self.data_group, async_op=True) if self.data_world > 1 else None
            reductions.append((bucket, shapes, flat, work))
        for bucket, shapes, flat, work in reductions:
            if work is not None:
                work.wait()
            used, *sums = flat.split([len(bucket), *(math.prod(shape) for shape in shapes)])
            for parameter, shape, count, total in zip(bucket, shapes, used.tolist(), sums, strict=True):
                if count:
                    self.low[parameter] = total.view(shape)
                    self.optimizer.state[parameter]["step"] += 1

    def _drop_foreign(self, parameter: nn.Parameter) -> None:
        state = self.optimizer.state.pop(parameter, None)
        if state is not None and parameter in set(self.matrices):
            self.optimizer.state[parameter] = {key: value for key, value in state.items() if not key.startswith("exp_avg")}

    def _forget(self) -> None:
        super()._forget()
        self.low.clear()


def owners(parameters: list[nn.Parameter], size: Callable[[nn.Parameter], int], world: int) -> dict[nn.Parameter, int]:
    """A rank for each parameter, so that ranks have about as many bytes by `size`: the largest first, to whom has least."""
    loads = [0] * world
    found = dict.fromkeys(parameters, 0)
    sizes = {parameter: size(parameter) for parameter in parameters}
    for parameter in sorted(parameters, key=sizes.__getitem__, reverse=True):
        found[parameter] = loads.index(min(loads))
        loads[found[parameter]] += sizes[parameter]
    return found


def verify_replicas(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Raise RunFailed naming the first parameter whose weight or basis differs between ranks; every rank calls it."""
    named = {}
    for name, parameter in trained.items():
        state = optimizer.state.get(parameter, {})
        named[name, "weight"] = parameter.detach()
        named |= {(name, key): value for key, value in state.items() if key.startswith("proj") and isinstance(value, Tensor)}
    mine = {where: digest(tensor) for where, tensor in named.items()}
    for rank, theirs in enumerate(dist.gather_objects(mine)):
        # a basis may be with its owner alone
        for name, part in mine:
            if mine[name, part] != theirs.get((name, part), mine[name, part]):
                raise RunFailed(
                    f"verify_replicas_every: the {part} of {name} differs between rank {dist.rank()} and rank {rank}; the replicas have "
                    "parted, so resume from the last checkpoint, on machines of one kind"
                )


def digest(tensor: Tensor) -> bytes:
    """Sixteen bytes that stand for all of a tensor's."""
    return hashlib.blake2b(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data, digest_size=16).digest()
