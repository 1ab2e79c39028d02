"""Plain PyTorch: every rank holds the whole model, gradients are summed once per step."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lm_core import dist
from lm_core.engine import state
from lm_core.engine.base import Engine
from lm_core.errors import ConfigError, RunFailed
from lm_core.optim import freeze, param_groups

if TYPE_CHECKING:
    from lm_core.method import Method
    from lm_core.options import RunConfig

_BUCKET = 25_000_000  # elements in one reduction: large enough to fill a link, small beside the gradients themselves


@dataclass
class Scaler:
    """Dynamic loss scale of fp16: doubled after 2000 good steps, halved by an overflow, never below 1."""

    scale: float = 2.0**16
    good: int = 0

    def after(self, overflow: bool) -> None:
        if overflow:
            self.scale, self.good = max(1.0, self.scale / 2), 0
        else:
            self.good += 1
            if self.good == 2000:
                self.scale, self.good = self.scale * 2, 0


class Replicated(Engine):
    """One process, or plain data parallelism. Weights keep the dtype they are built with; forward passes run under autocast.

    An optimizer with `per_layer = True` updates weights inside backward and exposes `grad_norm`; `step` then neither clips
    nor looks at gradients, and its own `step()` is called once, as a check that every layer was updated.
    """

    kind = "replicated"
    alone = True

    def __init__(self, config: RunConfig, method: Method, model: nn.Module, device: torch.device) -> None:
        self.method, self.device, self.seed = method, device, config.seed
        self.precision, self.clip, self.nonfinite = config.precision, config.grad_clip, config.nonfinite
        self.data_rank, self.data_world = dist.rank(), dist.world()
        freeze(model, method.param_rules())
        self.model = self._place(model)
        groups = self._own(param_groups(self.model, method.param_rules(), config))
        self.trained: dict[str, nn.Parameter] = {
            name: parameter for group in groups for name, parameter in zip(group["names"], group["params"], strict=True)
        }
        self.optimizer = method.optimizer(groups)
        self.scaler = Scaler() if config.precision == "fp16" else None
        self.per_layer: bool = getattr(self.optimizer, "per_layer", False)
        if self.per_layer:
            self._check_per_layer()
            # of several processes, which sum gradients in their optimizer, all must find out
            for name, parameter in self.trained.items() if self.data_world == 1 else ():
                parameter.register_hook(lambda gradient, name=name: _require_finite(name, gradient))

    def _check_per_layer(self) -> None:
        if self.kind != "replicated":
            raise ConfigError(f"engine: {self.kind} keeps no whole gradient for layer-wise updates; use --engine replicated")
        if self.data_world > 1:
            raise ConfigError(
                f"num_processes: layer-wise updates run in one process, not {self.data_world}; use 1, or turn layer-wise updates off"
            )
        if self.precision == "fp16":
            raise ConfigError("precision: fp16 learns of an overflow after layer-wise updates were made; use bf16 or fp32")
        if self.nonfinite == "drop":
            raise ConfigError("nonfinite: drop cannot take back layer-wise updates; use stop")

    def _place(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        broadcast(model)
        return model

    def _own(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's groups, for an engine that updates parts of parameters."""
        return groups

    def autocast(self) -> AbstractContextManager[None]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else loss * self.scaler.scale).backward()

    def step(self) -> float | None:
        if self.per_layer:
            self.optimizer.step()
            return float(self.optimizer.grad_norm)  # type: ignore[attr-defined]
        self._reduce()
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        unscale = 1.0 if self.scaler is None else 1 / self.scaler.scale
        norm = self._norm(gradients) * unscale
        if not math.isfinite(norm):
            self._refuse(norm)
            return None
        factor = unscale * (min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0)
        if factor != 1:
            torch._foreach_mul_(gradients, factor)
        self.optimizer.step()
        self._forget()
        if self.scaler is not None:
            self.scaler.after(overflow=False)
        return norm

    def _norm(self, gradients: list[Tensor]) -> float:
        return global_norm(gradients)

    def _refuse(self, norm: float) -> None:
        """The norm is the same on every rank, so all of them come here together."""
        if self.scaler is not None and self.scaler.scale > 1:
            self.scaler.after(overflow=True)
        elif self.nonfinite == "stop":
            raise RunFailed(
                f"gradient: the norm is {norm}; first parameter with a non-finite gradient: {self._first_nonfinite()}; "
                "lower --lr, or go on with --nonfinite drop"
            )
        self._forget()

    def _first_nonfinite(self) -> str:
        bad = [parameter.grad is not None and not bool(local(parameter.grad).isfinite().all()) for parameter in self.trained.values()]
        counts = dist.all_sum(torch.tensor(bad, dtype=torch.int32), self).tolist()
        return next((name for name, count in zip(self.trained, counts, strict=True) if count), "none (the squares overflow)")

    def _forget(self) -> None:
        for parameter in self.trained.values():
            parameter.grad = None

    def drop(self) -> None:
        self._forget()

    def _reduce(self) -> None:
        """Sum gradients over ranks in flat float32 buckets.

        A parameter that only some ranks used counts as zero on the others; one that none used stays without a gradient, so
        that the optimizer leaves it alone just as in one process. The counts of users travel with the gradients.
        """
        if self.data_world == 1:
            return
        bucket: list[nn.Parameter] = []
        size = 0
        parameters = self._summed_whole()
        for position, parameter in enumerate(parameters):
            bucket.append(parameter)
            size += parameter.numel()
            if size >= _BUCKET or position == len(parameters) - 1:
                self._reduce_bucket(bucket)
                bucket, size = [], 0

    def _summed_whole(self) -> list[nn.Parameter]:
        """Parameters whose gradients are summed over ranks as they are, for an engine that sums less of others."""
        return list(self.trained.values())

    def _reduce_bucket(self, bucket: list[nn.Parameter]) -> None:
        used = torch.tensor([parameter.grad is not None for parameter in bucket], dtype=torch.float32, device=self.device)
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([used, *(parameter.grad.flatten().float() for parameter in bucket if parameter.grad is not None)])
        torch_dist.all_reduce(flat, group=self.data_group)
        counts, *sums = flat.split([len(bucket), *(parameter.numel() for parameter in bucket)])
        for parameter, count, total in zip(bucket, counts.tolist(), sums, strict=True):
            if count == 0:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.copy_(total.view_as(parameter.grad))

    def save(self, folder: Path) -> None:
        """`model.safetensors` (+ `config.json` for a Hugging Face model), `optimizer.safetensors`, `optimizer.json`; rank 0 writes."""
        tensors, info = self._whole_state()
        dist.on_main(self._write, folder, self._whole_weights(), tensors, info)

    def _whole_weights(self) -> dict[str, Tensor]:
        """Every tensor of the model once, whole; every rank calls it."""
        return state.weights(self.model)

    def _whole_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors of the optimizer, whole, and the rest of it; every rank calls it."""
        return state.optimizer_tensors(self.optimizer, self.trained)

    def _held(self, name: str) -> bool:
        """Whether this rank keeps a part of a parameter; of one that nobody knows it is True, since that is refused."""
        return True

    def _own_part(self, info: dict[str, Any]) -> dict[str, Any]:
        """What this rank keeps of the rest of an optimizer."""
        return info

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """What this rank keeps of a parameter, or of a state tensor of its shape."""
        return whole

    def _write(self, folder: Path, weights: dict[str, Tensor], tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        hf_names = self._hf_names()
        outside = {name: tensor for name, tensor in weights.items() if name not in hf_names}
        state.write_tensors(
            folder / "model.safetensors",
            {hf_names.get(name, name): tensor for name, tensor in weights.items() if not hf_names or name in hf_names},
        )
        if hf_names:
            self.method.hf_model(self.model).config.save_pretrained(folder)
            if outside:
                state.write_tensors(folder / "outside.safetensors", outside)
        state.write_tensors(folder / "optimizer.safetensors", tensors)
        state.write_json(folder / "optimizer.json", {**info, "scaler": None if self.scaler is None else asdict(self.scaler)})

    def load_weights(self, folder: Path) -> None:
        """Restore the weights alone of what `save` wrote: for evaluation and export."""

        names = {hf_name: name for name, hf_name in self._hf_names().items()}

        def saved() -> Iterator[tuple[str, Tensor]]:
            for file in ("model.safetensors", "outside.safetensors"):
                if file == "model.safetensors" or (folder / file).exists():
                    for saved_name, tensor in state.read_tensors(folder / file):
                        name = names.get(saved_name, saved_name)
                        if self._held(name):
                            yield name, self._part(name, tensor)

        state.load_weights(self.model, saved(), {})

    def load(self, folder: Path) -> None:
        info = self._own_part(json.loads((folder / "optimizer.json").read_text()))
        state.check_optimizer(state.describe(self.optimizer, self.trained), info)
        self.load_weights(folder)
        tensors = {
            path: local(self._part(path.rpartition("/")[0], tensor))
            for path, tensor in state.read_tensors(folder / "optimizer.safetensors")
            if self._held(path.rpartition("/")[0])
        }
        state.load_optimizer(self.optimizer, self.trained, tensors, info)
        if self.scaler is not None and info["scaler"] is not None:
            self.scaler = Scaler(**info["scaler"])

    def _hf_names(self) -> dict[str, str]:
        """Name in the module -> name in its Hugging Face model; empty when there is none, or when it shares no tensors with the module."""
        # where transformers was not imported (seconds), there is no such model
        transformers = sys.modules.get("transformers.modeling_utils")
        if transformers is None or not any(isinstance(module, transformers.PreTrainedModel) for module in self.model.modules()):
            return {}
        names = {id(tensor): name for name, tensor in state.weights(self.model).items()}
        inside = state.weights(self.method.hf_model(self.model))
        return (
            {names[id(tensor)]: name for name, tensor in inside.items()} if all(id(tensor) in names for tensor in inside.values()) else {}
        )

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            yield name, tensor.detach().cpu()


def broadcast(model: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers, bit for bit."""
    if dist.world() == 1:
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        # as bytes, since not every backend knows every dtype
        whole = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        torch_dist.broadcast(whole, src=0)
        tensor.detach().copy_(whole.view(tensor.dtype).view(tensor.shape))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(gradients: list[Tensor]) -> float:
    """Euclidean norm over all gradients in float32, whole even where they are sharded."""
    if not gradients:
        return 0.0
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, torch.float32)))
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _require_finite(name: str, gradient: Tensor) -> None:
    if not bool(gradient.isfinite().all()):
        raise RunFailed(
            f"gradient: not finite in {name}; layer-wise updates cannot be taken back, so resume from the last checkpoint with a lower --lr"
        )
