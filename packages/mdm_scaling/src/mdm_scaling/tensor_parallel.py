"""Tensor parallelism: attention heads and feed-forward columns are split over ranks, everything else is replicated.

torch's DTensor does the communication: q, k, v, gate and up are split by columns, attention output and down by rows, so a
layer costs two reductions forward and two backward. Embedding, norms and head are whole on every rank; their gradients are
equal on the ranks of a group, because the residual stream is. The optimizer sees this rank's parts as plain tensors.
Checkpoints hold whole tensors in the replicated engine's files, so a run goes on at any layout.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lm_core import dist
from lm_core.engine import state
from lm_core.engine.replicated import Replicated, broadcast, local
from lm_core.errors import ConfigError
from lm_core.models import decoder_layers

if TYPE_CHECKING:
    from mdm_scaling.method import Pretrain

_PLAN: dict[str, type[ColwiseParallel] | type[RowwiseParallel]] = {
    "self_attn.q_proj": ColwiseParallel,
    "self_attn.k_proj": ColwiseParallel,
    "self_attn.v_proj": ColwiseParallel,
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


class TensorParallel(Replicated):
    """Consecutive ranks share one model; groups of them see different data."""

    alone = False

    def __init__(self, method: Pretrain, model: nn.Module, device: torch.device) -> None:
        config = method.config
        self.size = config.tensor_model_parallel_size
        # ranks of one tensor group are neighbours, stages of a pipeline are far apart: the first talk the most
        sizes = (config.pipeline_model_parallel_size, config.replicas(dist.world()), self.size)
        dist.require_group(device)
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("pipeline", "data", "tensor"))
        self.mesh, self.data_mesh, self.pipeline_mesh = mesh["tensor"], mesh["data"], mesh["pipeline"]
        super().__init__(config, method, model, device)
        self.data_rank, self.data_world = self.data_mesh.get_local_rank(), self.data_mesh.size()
        self.data_group = self.data_mesh.get_group()

    def _place(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        broadcast(model)
        if self.size == 1:
            return model
        config = self.method.hf_model(model).config
        for what, count in (
            ("attention heads", config.num_attention_heads),
            ("key and value heads", config.num_key_value_heads),
            ("feed-forward columns", config.intermediate_size),
        ):
            if count % self.size:
                raise ConfigError(f"tensor_model_parallel_size: {count} {what} are not a multiple of {self.size}; use a divisor")
        if any(name.endswith("_proj.bias") for name, _ in model.named_parameters()):
            raise ConfigError("tensor_model_parallel_size: splits linear layers without biases; use 1, or a model without them")
        for layer in decoder_layers(model):
            # feed-forward layers without a gate have two of their three projections
            held = dict(layer.named_modules())
            parallelize_module(layer, self.mesh, {name: style() for name, style in _PLAN.items() if name in held})
            attention = cast(Any, layer).self_attn
            attention.forward = _OwnDropout(attention, attention.forward, self.mesh.get_local_rank())
        return model

    def _own(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Plain parameters that share their memory with this rank's parts: no optimizer has to know DTensors."""
        self.split: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for group in groups:
            for position, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True)):
                if isinstance(parameter, DTensor):
                    part = nn.Parameter(cast(DTensor, parameter.detach()).to_local())
                    self.split[name] = cast(nn.Parameter, parameter), part
                    group["params"][position] = part
        return groups

    def step(self) -> float | None:
        for whole, part in self.split.values():
            part.grad = None if whole.grad is None else local(whole.grad)
        return super().step()

    def _forget(self) -> None:
        super()._forget()
        for whole, _ in self.split.values():
            whole.grad = None

    def _norm(self, gradients: list[Tensor]) -> float:
        return float(self._squares().sqrt())

    def _squares(self, leave_out: Collection[str] = ()) -> Tensor:
        """Over split parameters the squares of all ranks of the group add up; replicated ones count once."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for name, parameter in self.trained.items():
            if parameter.grad is not None and name not in leave_out:
                squares[int(name in self.split)] += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).double() ** 2
        torch_dist.all_reduce(squares[1:], group=self.mesh.get_group())
        return squares.sum()

    # --- checkpoints: whole tensors ---

    def _whole_weights(self) -> dict[str, Tensor]:
        return {name: _whole(tensor) for name, tensor in state.weights(self.model).items()}

    def _whole_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, info = super()._whole_state()
        return {path: self._joined(path.rpartition("/")[0], tensor) for path, tensor in tensors.items()}, info

    def _joined(self, name: str, part: Tensor) -> Tensor:
        """A state tensor from its parts; one of another shape than the parameter's part is the same everywhere."""
        if name not in self.split or part.shape != self.split[name][1].shape:
            return part
        whole = cast(DTensor, self.split[name][0])
        return DTensor.from_local(part, self.mesh, whole.placements, run_check=False).full_tensor()

    def _part(self, name: str, whole: Tensor) -> Tensor:
        if name not in self.split or whole.shape != self.split[name][0].shape:
            return whole
        placements = cast(DTensor, self.split[name][0]).placements
        (placement,) = placements
        assert isinstance(placement, Shard)
        mine = whole.chunk(self.size, placement.dim)[self.mesh.get_local_rank()].contiguous().to(self.device)
        return DTensor.from_local(mine, self.mesh, placements, run_check=False)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            yield name, _whole(tensor).detach().cpu()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _OwnDropout:
    """The forward of an attention module with dropout of this rank's heads by draws of its own.

    The draws of everything outside, which every rank of a group makes alike, go on as if attention had taken one number.
    """

    def __init__(self, module: nn.Module, forward: Any, rank: int) -> None:
        self.module, self.forward, self.rank = module, forward, rank

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.module.training and cast(Any, self.module).attention_dropout):
            return self.forward(*args, **kwargs)
        seed = int(torch.randint(2**62, ()))
        with torch.random.fork_rng():
            torch.manual_seed(seed + self.rank)
            return self.forward(*args, **kwargs)
