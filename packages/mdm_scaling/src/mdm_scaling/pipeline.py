"""Pipeline parallelism: consecutive decoder layers lie on different processes, and hidden states travel between them.

torch.distributed.pipelining runs the micro-batches of a step through the stages, one forward and one backward in turn. Every
process of a pipeline reads the same batches and draws the same masks, since both are functions of the sample's number, so
that nothing but hidden states and their gradients is sent. A tied embedding lies on the first and the last stage; their
gradients are added before the update, which keeps the two alike. Stages may be split by tensor parallelism, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from lm_core.counter import reseed
from lm_core.engine import state
from lm_core.engine.base import Sums
from lm_core.errors import ConfigError
from lm_core.estimate import parameters
from lm_core.method import Batch, Method
from lm_core.models import decoder_layers
from mdm_scaling.model import Scorer
from mdm_scaling.tensor_parallel import TensorParallel

if TYPE_CHECKING:
    from mdm_scaling.method import Pretrain


class Pipeline(TensorParallel):
    """Each process holds one stage: the first with the embedding, the last with the output head."""

    def __init__(self, method: Pretrain, model: nn.Module, device: torch.device) -> None:
        self.schedules: dict[tuple[int, ...], Schedule1F1B | ScheduleGPipe] = {}
        # of the micro-batch that the schedule has this stage run, else None
        self.turn: _Turn | None = None
        super().__init__(method, model, device)

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    # --- the model of a stage ---

    def _place(self, model: nn.Module) -> nn.Module:
        self.pipe = self.pipeline_mesh.get_group()
        self.stage, self.stages = self.pipeline_mesh.get_local_rank(), self.pipeline_mesh.size()
        model = cast(Scorer, super()._place(model))
        self.model = model
        self.counts = parameters(model)
        self.everywhere, self.all_hf_names = state.weights(model).keys(), super()._hf_names()
        inner: Any = self.method.hf_model(model)
        self.width = int(inner.config.hidden_size)
        layers = decoder_layers(model)
        if len(layers) < self.stages:
            raise ConfigError(f"pipeline_model_parallel_size: {self.stages} stages, but {len(layers)} layers; use at most that many")
        self.tied = inner.lm_head.weight is inner.model.embed_tokens.weight
        # the same embedding under both names, as a checkpoint of one process has it
        self.aliases = {"model.lm_head.weight": "model.model.embed_tokens.weight"} if self.tied else {}
        mine = range(self.stage * len(layers) // self.stages, (self.stage + 1) * len(layers) // self.stages)
        for number in range(len(layers)):
            if number not in mine:
                inner.model.layers[number] = _Elsewhere()
        if not self.last:
            inner.model.norm, inner.lm_head = _Elsewhere(), _Elsewhere()
        if not self.first and not (self.last and self.tied):
            inner.model.embed_tokens = _Elsewhere()
        for name in ("target_position", "embed_positions"):
            if not self.first and hasattr(inner.model, name):
                setattr(inner.model, name, _Elsewhere())
        self.here = state.weights(model).keys()
        model.through = self._through  # type: ignore[method-assign]
        return model

    def _through(
        self, states: Callable[[Tensor | None], Tensor], score: Callable[[Tensor], Tensor], size: torch.Size, losses: torch.Size
    ) -> Tensor:
        """`Scorer.through` of the whole pipeline; in a turn, which is one stage's, the losses of stages before the last are 0."""
        like = next(self.model.parameters()).new_zeros
        if self.turn is not None:
            leaving = states(self.turn.entering)
            if self.last:
                return score(leaving)
            self.turn.leaving = leaving
            return like(losses)
        # an evaluation: stage after stage, and everybody learns what came out
        assert not torch.is_grad_enabled()
        entering, found = None, like(losses)
        if not self.first:
            entering = like((*size, self.width))
            torch_dist.recv(entering, group=self.pipe, group_src=self.stage - 1)
        leaving = states(entering)
        if self.last:
            found = score(leaving).to(found.dtype)
        else:
            torch_dist.send(leaving.contiguous(), group=self.pipe, group_dst=self.stage + 1)
        torch_dist.broadcast(found, group=self.pipe, group_src=self.stages - 1)
        return found

    # --- a step ---

    def accumulate(self, method: Method, batches: Sequence[Batch], targets: int) -> Sums:
        here = [batch.to(self.device) for batch in batches]
        sums = Sums(loss=torch.zeros((), device=self.device))

        def run(number: Tensor, entering: Tensor | None = None) -> Tensor:
            """This stage's part of one micro-batch: the states it leaves, or the share of the loss in the step's mean."""
            batch = here[int(number)]
            # dropout of one stage is not that of another
            reseed(self.seed, batch.step, int(number), self.data_rank + self.data_world * self.stage)
            self.turn = _Turn(entering)
            try:
                with self.autocast():
                    (loss,) = method.losses(self.model, batch)
            finally:
                turn, self.turn = self.turn, None
            if not self.last:
                assert turn.leaving is not None
                return turn.leaving
            sums.add(loss)
            return loss.total / targets * (1.0 if self.scaler is None else self.scaler.scale)

        schedule = self._schedule(len(here), here[0]["input_ids"].shape)
        schedule._stage.submod.run = run  # type: ignore[assignment]
        numbers = torch.arange(len(here))
        schedule.step(number=numbers, target=numbers if self.last else None, return_outputs=False)
        return self._told(sums)

    def _schedule(self, count: int, shape: torch.Size) -> Schedule1F1B | ScheduleGPipe:
        """The order of so many micro-batches of one shape; what is sent is known from the shape, so nothing is asked for first."""
        key = (count, *shape)
        if key not in self.schedules:
            states = torch.empty(*shape, self.width, device="meta", requires_grad=True)
            stage = PipelineStage(
                _Runner(),
                self.stage,
                self.stages,
                self.device,
                input_args=() if self.first else (states,),
                output_args=(torch.empty((), device="meta", requires_grad=True) if self.last else states,),
                group=self.pipe,
            )
            # with fewer micro-batches than stages there is no turn to take
            kind = Schedule1F1B if count >= self.stages else ScheduleGPipe
            self.schedules[key] = kind(stage, count, loss_fn=lambda share, number: share, scale_grads=False)
        return self.schedules[key]

    def _told(self, sums: Sums) -> Sums:
        """The last stage's sums, on every stage."""
        box = [Sums(sums.loss.cpu(), {name: value.cpu() for name, value in sums.metrics.items()})]
        torch_dist.broadcast_object_list(box, group=self.pipe, group_src=self.stages - 1, device=torch.device("cpu"))
        return Sums(box[0].loss.to(self.device), {name: value.to(self.device) for name, value in box[0].metrics.items()})

    def _reduce(self) -> None:
        super()._reduce()
        if not self.tied or not (self.first or self.last):
            return
        gradient = self.trained["model.model.embed_tokens.weight"].grad
        assert gradient is not None
        if self.last:
            torch_dist.send(gradient, group=self.pipe, group_dst=0)
            torch_dist.recv(gradient, group=self.pipe, group_src=0)
        else:
            other = torch.empty_like(gradient)
            torch_dist.recv(other, group=self.pipe, group_src=self.stages - 1)
            gradient += other
            torch_dist.send(gradient, group=self.pipe, group_dst=self.stages - 1)

    def _squares(self, leave_out: Collection[str] = ()) -> Tensor:
        """Over the stages; a tied embedding counts on the first one."""
        squares = super()._squares(self.aliases.values() if self.last else ())
        torch_dist.all_reduce(squares, group=self.pipe)
        return squares

    # --- checkpoints: the tensors of all stages ---

    def _hf_names(self) -> dict[str, str]:
        return self.all_hf_names

    def _held(self, name: str) -> bool:
        return name in self.here or name not in self.everywhere

    def _own_part(self, info: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "names": [name for name in group["names"] if self._held(name)]} for group in info["groups"]]
        return {**info, "groups": groups, "state": {name: values for name, values in info["state"].items() if self._held(name)}}

    def _whole_weights(self) -> dict[str, Tensor]:
        return dict(self._collected(super()._whole_weights()))

    def _whole_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, info = super()._whole_state()
        every: list[dict[str, Any]] = [{}] * self.stages
        torch_dist.all_gather_object(every, info, group=self.pipe)
        merged = every[0]
        for other in every[1:]:
            for group, more in zip(merged["groups"], other["groups"], strict=True):
                group["names"] += [name for name in more["names"] if name not in group["names"]]
            merged["state"] |= other["state"]
        return dict(self._collected(tensors)), merged

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        names = {first: name for name, first in self.aliases.items()}
        for name, tensor in self._collected(super()._whole_weights()):
            whole = tensor.detach().cpu()
            yield name, whole
            if name in names:
                yield names[name], whole

    def _collected(self, mine: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of every stage, in the order of the stages, one that two of them hold once; all processes iterate."""
        seen: set[str] = set()
        for stage in range(self.stages):
            box = [[(name, tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in mine.items()]]
            torch_dist.broadcast_object_list(box, group=self.pipe, group_src=stage, device=torch.device("cpu"))
            for name, shape, dtype, kind in box[0]:
                if name in seen:
                    continue
                seen.add(name)
                place = self.device if kind != "cpu" else torch.device("cpu")
                tensor = mine[name].detach().contiguous() if stage == self.stage else torch.empty(shape, dtype=dtype, device=place)
                torch_dist.broadcast(tensor, group=self.pipe, group_src=stage)
                yield name, tensor


class _Turn:
    """What enters and leaves a stage in one micro-batch."""

    def __init__(self, entering: Tensor | None) -> None:
        self.entering = entering
        self.leaving: Tensor | None = None


class _Runner(nn.Module):
    """What a schedule calls: the function of the step."""

    run: Callable[..., Tensor]

    def forward(self, entering: Tensor | None = None, *, number: Tensor) -> Tensor:
        return self.run(number, entering)


class _Elsewhere(nn.Module):
    """A module that another process holds; hidden states pass."""

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return states
