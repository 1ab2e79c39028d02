"""FSDP2: weights, gradients and optimizer state of every decoder layer are sharded over the ranks (`fully_shard`)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.tensor as distributed_tensor
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from lm_core import dist
from lm_core.engine import state
from lm_core.engine.replicated import Replicated, Scaler, broadcast
from lm_core.models import decoder_layers


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None, keep_root: bool = True) -> nn.Module:
    """`model`, sharded in place over all ranks: one unit per decoder layer, and one for everything else.

    `dtype` is that of forward and backward passes; gradients are reduced in float32. The last unit (embedding, norm, head)
    is whole while the root's forward runs, so a root may read a head's weight directly; with `keep_root` it stays whole until
    the backward pass, without it is shared out again (inference).
    """
    dist.require_group(device)
    mesh = init_device_mesh(device.type, (dist.world(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        if next(layer.parameters(), None) is not None:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=not keep_root)
    # buffers are not sharded
    return model.to(device)


class Sharded(Replicated):
    """Resumes on any number of ranks (DCP). State tensors of an optimizer are DTensors, or equal on every rank."""

    kind = "sharded"

    def _place(self, model: nn.Module) -> nn.Module:
        dist.require_group(self.device)
        # each unit moves to the device as it is sharded, so the whole model never has to fit there
        broadcast(model)
        return shard(model, self.device, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision])

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # FSDP2 averages over the ranks; the contract is a sum
        super().backward(loss * self.data_world)

    def _reduce(self) -> None:
        """Reduced inside backward."""

    def save(self, folder: Path) -> None:
        """`model/` and `optimizer/` in the format of torch's distributed checkpoints, and `optimizer.json`."""
        _write(folder / "model", state.weights(self.model))
        tensors, info = state.optimizer_tensors(self.optimizer, self.trained)
        plain = {name: _checksum(tensor) for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
        dist.same_on_all(plain, "optimizer state in plain tensors")
        _write(folder / "optimizer", tensors)
        info["placements"] = {name: _placement(tensor) for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        info["scaler"] = None if self.scaler is None else asdict(self.scaler)
        dist.on_main(state.write_json, folder / "optimizer.json", info)

    def load_weights(self, folder: Path) -> None:
        weights = {name: tensor.detach() for name, tensor in state.weights(self.model).items()}
        state.check_weights(weights, _shapes(folder / "model"))
        load(weights, storage_reader=FileSystemReader(folder / "model"))

    def load(self, folder: Path) -> None:
        info = json.loads((folder / "optimizer.json").read_text())
        state.check_optimizer(state.describe(self.optimizer, self.trained), info)
        self.load_weights(folder)
        tensors: dict[str, Tensor] = {}
        if (folder / "optimizer").exists():
            mesh = self._mesh()
            for name, (shape, dtype) in _shapes(folder / "optimizer").items():
                if name in info["placements"]:
                    dim = info["placements"][name]
                    tensors[name] = distributed_tensor.empty(
                        shape, dtype=dtype, device_mesh=mesh, placements=[Replicate() if dim is None else Shard(dim)]
                    )
                else:
                    tensors[name] = torch.empty(shape, dtype=dtype)
            load(tensors, storage_reader=FileSystemReader(folder / "optimizer"))
        state.load_optimizer(self.optimizer, self.trained, tensors, info)
        if self.scaler is not None and info["scaler"] is not None:
            self.scaler = Scaler(**info["scaler"])

    def _mesh(self) -> DeviceMesh:
        parameter = next(iter(self.trained.values()))
        assert isinstance(parameter, DTensor)
        return parameter.device_mesh

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        return
    try:
        save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        # it is no Exception, and hides what the system said (a full disk) to one of the ranks
        first, _ = next(iter(error.failures.values()))
        raise first from error


def _shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}


def _placement(tensor: DTensor) -> int | None:
    """The dimension that is sharded, or None for a replicated tensor."""
    (placement,) = tensor.placements
    return placement.dim if isinstance(placement, Shard) else None


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
