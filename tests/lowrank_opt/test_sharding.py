"""Matrices shared out by rows over two processes (FSDP2) against one process that has them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch import nn

from lm_core.config import build
from lm_core.engine import make_engine
from lm_core.errors import ResumeRefused
from lm_core.method import Batch, Loss
from lm_core.testing import spawn
from lowrank_opt import GaLoreAdamW, LDAdamW, UnsupportedDistributedError
from lowrank_opt.base import BaseOptimizer
from lowrank_opt.commands import InspectConfig
from lowrank_opt.config import TrainConfig
from lowrank_opt.inspection import run
from lowrank_opt.method import LowRank

STEPS, GAP, RANK = 8, 4, 8
# rows that two and four processes share unevenly; the last is dense and stands for embeddings
SHAPES = ((49, 32), (33, 80), (96, 130), (64, 4))


class Products(nn.Module):
    """The sum of <W, G> over all weights, so that a sample's gradient is a given matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(0.1 * torch.randn(shape)) for shape in SHAPES])

    def forward(self, step: int, sample: int) -> torch.Tensor:
        return sum(((w * gradient(tuple(w.shape), step, sample)).sum() for w in self.weights), torch.zeros(()))


class Linear(LowRank):
    def build(self) -> nn.Module:
        self.module = Products()
        self.low_rank = frozenset(f"weights.{n}" for n in range(len(SHAPES) - 1))
        return self.module

    def losses(self, model: nn.Module, batch: Batch) -> Any:
        yield Loss(total=model(batch.step, int(batch.index)))


def gradient(shape: tuple[int, int], step: int, sample: int) -> torch.Tensor:
    """Eight directions of different strength that all samples of a step share, far above the rest."""
    generator = torch.Generator().manual_seed(1000 * step + shape[0])
    left = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))[0]
    strength = (1 - 0.08 * torch.arange(min(shape))) * (torch.arange(min(shape)) < RANK)
    own = torch.Generator().manual_seed(1000 * step + sample + 1)
    return left @ torch.diag(strength) @ right.t() * (1 + 0.1 * sample) + 1e-4 * torch.randn(shape, generator=own)


def options(**values: Any) -> TrainConfig:
    galore = {"rank": RANK, "update_proj_gap": GAP, "proj_type": "right", "min_8bit_size": 64, **values.pop("galore", {})}
    given = {"mode": "pretraining", "model": "llama_test", "lr": 0.01, "precision": "fp32", "weight_decay": 0.1, **values}
    if given["optimizer"] in ("apollo", "apollo-mini", "baseline"):
        galore = {}
    return build(TrainConfig, {"apollo": {"apollo_rank": RANK} if "apollo" in given["optimizer"] else {}, **given, "galore": galore})


def trained(folder: Path | None = None, begun: Path | None = None, steps: int = STEPS, **values: Any) -> dict[str, Any]:
    """Weights, norms and state after `steps` updates with two samples each; saved half way into `folder`, or begun from there."""
    rank, world = (torch_dist.get_rank(), torch_dist.get_world_size()) if torch_dist.is_initialized() else (0, 1)
    config = options(**values)
    method = Linear(config)
    engine: Any = make_engine(config, method, method.build(), torch.device("cpu"))
    for group in engine.optimizer.param_groups:
        # APOLLO's side is no option
        group.update({"proj_type": "right"} if group.get("rank") else {})
    if begun is not None:
        engine.load(begun)
    norms = []
    for step in range(STEPS // 2 if begun else 0, steps):
        if folder is not None and step == STEPS // 2:
            if rank == 0:
                folder.mkdir()
            torch_dist.barrier()
            engine.save(folder)
            if rank == 0:
                # what the loop adds, and `inspect` looks for
                (folder / "state.json").write_text("{}")
            engine = make_engine(config, method, method.build(), torch.device("cpu"))
            engine.load(folder)
        engine.start(0.01)
        batches = [Batch({}, index=torch.tensor(sample), step=step) for sample in range(rank, 2, world)]
        engine.accumulate(method, batches, 2)
        norms.append(engine.step())
    optimizer: BaseOptimizer = engine.optimizer
    state = {name: dict(optimizer.state[p]) for name, p in engine.trained.items()}
    return {
        "weights": dict(engine.full_weights()),
        "norms": norms,
        "proj": {name: values["proj"] for name, values in state.items() if "proj" in values},
        "rows": {name: values["exp_avg"].to_local().shape for name, values in state.items() if hasattr(values.get("exp_avg"), "to_local")},
        "bytes": (optimizer.state_bytes(), optimizer.predicted_state_bytes()),
    }


KINDS: dict[str, dict[str, Any]] = {
    "galore": {"optimizer": "galore"},
    "clipped rsvd": {"optimizer": "galore", "grad_clip": 0.5, "galore": {"proj_method": "rsvd", "oversample": 2}},
    "subspace": {"optimizer": "galore", "galore": {"proj_method": "subspace", "moment_transfer": "project", "adaptive": True}},
    "svd": {"optimizer": "galore", "galore": {"proj_method": "svd", "moment_transfer": "reset"}},
    "random": {"optimizer": "galore", "galore": {"proj_method": "random"}},
    "fira": {"optimizer": "fira"},
    "apollo": {"optimizer": "apollo"},
    "apollo-mini": {"optimizer": "apollo-mini"},
    "baseline": {"optimizer": "baseline"},
    "galore8bit": {"optimizer": "galore8bit", "galore": {"block_size": 16}},
    "qgalore": {"optimizer": "qgalore"},
}
# the blocks of moments in 8 bits lie otherwise where a process has some rows only, and bases in 4 bits jump
CLOSE = {"galore8bit": 2e-3, "qgalore": 2e-2}
SAVED = ("galore", "apollo", "galore8bit")


def shared(folder: Path) -> dict[str, Any]:
    """All that is asked of two processes, in one launch."""
    found = {name: trained(folder / name if name in SAVED else None, engine="sharded", **values) for name, values in KINDS.items()}
    refused = {}
    for kind, more in ((LDAdamW, {}), (GaLoreAdamW, {"proj_type": "left"}), (GaLoreAdamW, {"compat": "galore_torch"})):
        model = sharded_products()
        optimizer: BaseOptimizer = kind([{"params": [model.weights[0]], "rank": 4, **more}])
        model(0, 0).backward()
        with pytest.raises(UnsupportedDistributedError) as error:
            optimizer.step()
        refused[f"{kind.__name__} {more}"] = str(error.value)
    optimizer = GaLoreAdamW([in_columns := by_columns()], rank=4, proj_type="right")
    in_columns.grad = torch.ones_like(in_columns)
    with pytest.raises(UnsupportedDistributedError) as error:
        optimizer.step()
    refused["columns"] = str(error.value)
    model = sharded_products()
    forced = GaLoreAdamW(model.weights, rank=4)
    return {"found": found, "refused": refused, "forced": forced.param_groups[0]["proj_type"]}


def sharded_products() -> Products:
    from lm_core.engine.sharded import shard

    model = Products()
    shard(model, torch.device("cpu"))
    return model


def by_columns() -> nn.Parameter:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return nn.Parameter(distribute_tensor(torch.ones(32, 48), init_device_mesh("cpu", (2,)), [Shard(1)]))


def alone(folder: Path) -> dict[str, Any]:
    """One process goes on from what two have saved; moments in 8 bits stay with as many processes as before."""
    later = {name: trained(begun=folder / name, engine="sharded", **KINDS[name]) for name in SAVED if name != "galore8bit"}
    with pytest.raises(ResumeRefused, match=r"8-bit blocks of weights.0 end where .* as many processes"):
        trained(begun=folder / "galore8bit", engine="sharded", **KINDS["galore8bit"])
    return later


def test_two_processes_with_rows_of_each_matrix_equal_one(tmp_path: Path) -> None:
    first, second = spawn(shared, tmp_path)
    later = spawn(alone, tmp_path, world=1)[0]
    for name, values in KINDS.items():
        ours, theirs, whole = first["found"][name], second["found"][name], trained(engine="replicated", **values)
        close = CLOSE.get(name, 1e-6)
        for weight, tensor in whole["weights"].items():
            assert torch.equal(ours["weights"][weight], theirs["weights"][weight])
            torch.testing.assert_close(ours["weights"][weight], tensor, rtol=0, atol=close, msg=f"{name} {weight}")
            if name in later:
                torch.testing.assert_close(later[name]["weights"][weight], tensor, rtol=0, atol=close)
        assert ours["norms"] == pytest.approx(whole["norms"], rel=1e-5)
        assert all(torch.equal(basis, theirs["proj"][which]) for which, basis in ours["proj"].items())
        for held, predicted in (ours["bytes"], theirs["bytes"]):
            assert held == predicted
        assert ours["bytes"][0] < whole["bytes"][0]
    # every state tensor whole, in the checkpoint that two processes wrote together
    kept = run(InspectConfig(checkpoint=tmp_path / "galore8bit"))
    assert kept["parameters"]["weights.0"]["tensors"]["exp_avg_q"]["shape"] == [RANK, 49]
    assert kept["parameters"]["weights.0"]["tensors"]["exp_avg_absmax"]["shape"] == [RANK, 2 + 2]
    # L lies column by column where the rows are
    assert [side["found"]["galore"]["rows"]["weights.0"] for side in (first, second)] == [(RANK, 25), (RANK, 24)]
    assert first["forced"] == "right"
    known = ("LDAdamW needs the whole matrix", "proj_type left needs", "compat galore_torch needs", "low-rank updates know rows")
    words = dict(zip(first["refused"], known, strict=True))
    for which, message in first["refused"].items():
        assert words[which] in message, message
