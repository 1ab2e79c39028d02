"""Helpers for tests, and what every training method must hold: a package subclasses `Conformance` in its tests.

class TestConformance(Conformance):
    def configure(self, **options):
        return TrainConfig(model="tiny", data=["synthetic:markov"], **options)

    def method(self, config):
        return MyMethod(config)
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

from lm_core.data.loader import Loader
from lm_core.engine import Engine, make_engine
from lm_core.errors import ConfigError
from lm_core.method import Method
from lm_core.options import RunConfig
from lm_core.run import make_loader, run
from lm_core.train import Report, train_step


def _enter(rank: int, world: int, folder: str, environment: Mapping[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    # a file as the meeting place: no port to collide with another test
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        result = function(*args)
        Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def spawn(function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """Run `function(*args)` on `world` gloo processes; the results in rank order.

    `function`, its arguments and its result must be picklable, so it lives at the top of a module.
    An exception in any process is raised here with its traceback. The first launch imports torch and transformers once, into a
    process that later ones are forked from; still, put many assertions into one launch.
    """
    # importing deepspeed may initialise CUDA, after which nothing can be forked; the second name is what it imports when first used
    deepspeed = [] if torch.cuda.is_available() else ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"]
    multiprocessing.set_forkserver_preload(["lm_core.engine.sharded", *deepspeed])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_enter, args=(world, folder, dict(os.environ), function, args), nprocs=world, start_method="forkserver")
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(world)]


STEPS = 8
GLOBAL_BATCH = 4
# the engines that cut something into parts, by the name that `Conformance.refuses` and docs/engines.md use
ENGINES: dict[str, dict[str, Any]] = {
    "sharded": {"engine": "sharded"},
    "ZeRO 1": {"engine": "deepspeed", "zero_stage": 1},
    "ZeRO 2": {"engine": "deepspeed", "zero_stage": 2},
    "ZeRO 3": {"engine": "deepspeed", "zero_stage": 3},
    "ZeRO 2, optimizer offloaded": {"engine": "deepspeed", "zero_stage": 2, "offload": "optimizer"},
    "ZeRO 3, all offloaded": {"engine": "deepspeed", "zero_stage": 3, "offload": "all"},
}


class Conformance:
    """Seven properties on a tiny model, in seconds. `configure` and `method` are required, the rest are settings."""

    # A loss that depends on how a batch is split into micro-batches (a local balance loss) says so here, with its reason.
    split_invariant = True
    # relative; summation order differs between splits and world sizes
    tolerance = 1e-4
    # Engines that cannot carry this method, with words of the message that says why and what to use. The others must give equal losses.
    refuses: Mapping[str, str] = {}

    def configure(self, **options: Any) -> RunConfig:
        """Options of a tiny run in float32; `options` (output, budget, batch) win over the package's own."""
        raise NotImplementedError

    def method(self, config: RunConfig) -> Method:
        raise NotImplementedError

    def options(self, folder: Path | None = None, **changes: Any) -> RunConfig:
        defaults: dict[str, Any] = {
            "output_dir": folder,
            "budget": f"{STEPS} steps",
            "micro_batch_size": GLOBAL_BATCH,
            "precision": "fp32",
            "device": "cpu",
            "save_every": str(STEPS // 2),
            "eval_every": "0.5",
            "log_every": 1,
            "tensorboard": False,
            "eval_tokens": 512,
        }
        return self.configure(**{**defaults, **changes})

    def run(self, folder: Path, **changes: Any) -> dict[str, Any]:
        config = self.options(folder, **changes)
        return run(config, self.method(config))

    def test_loss_falls(self, tmp_path: Path) -> None:
        self.run(tmp_path, budget=f"{4 * STEPS} steps", save_every="never")
        losses = _losses(tmp_path)
        first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
        assert last < first, f"training loss went from {first} to {last}"

    def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(self, tmp_path: Path) -> None:
        whole, half = tmp_path / "whole", tmp_path / "half"
        self.run(whole)
        shutil.copytree(whole, half)
        shutil.rmtree(half / "final")
        shutil.rmtree(half / "checkpoints" / f"checkpoint-{STEPS}")
        self.run(half, resume="auto")
        assert _losses(half) == _losses(whole)
        assert _weights(half).keys() == _weights(whole).keys()
        for name, tensor in _weights(whole).items():
            assert torch.equal(_weights(half)[name], tensor), f"{name} differs after a resume"

    def test_two_processes_equal_one(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        self.run(one)
        # as launchers that may be run again start it
        spawn(_run, type(self), two, {"micro_batch_size": GLOBAL_BATCH // 2, "resume": "auto"})
        _assert_close(_losses(two), _losses(one), self.tolerance)
        # half a run on two processes, the rest on one: the same samples in the same order
        shutil.rmtree(two / "final")
        shutil.rmtree(two / "checkpoints" / f"checkpoint-{STEPS}")
        self.run(two, resume="auto")
        _assert_close(_losses(two), _losses(one), self.tolerance)

    def test_loss_does_not_depend_on_how_a_batch_is_split(self) -> None:
        if not self.split_invariant:
            return
        whole = self.step(micro_batch_size=GLOBAL_BATCH)
        split = self.step(micro_batch_size=GLOBAL_BATCH // 2, accumulate=2)
        _assert_close([whole.loss, whole.grad_norm], [split.loss, split.grad_norm], self.tolerance)

    def step(self, **changes: Any) -> Report:
        config = self.options(**changes)
        method, engine, loader = self.assemble(config)
        return train_step(engine, method, next(loader), config.lr)

    def assemble(self, config: RunConfig) -> tuple[Method, Engine, Loader]:
        method = self.method(config)
        data = method.data(method.tokenizer())
        torch.manual_seed(config.seed)
        engine = make_engine(config, method, method.build(), torch.device("cpu"))
        return method, engine, make_loader(config, data, engine.data_rank, engine.data_world)

    def test_every_engine_gives_the_losses_of_one_process_or_says_why_it_cannot(self) -> None:
        expected = _losses_of_steps(type(self), {"micro_batch_size": GLOBAL_BATCH})
        for name, found in zip(ENGINES, spawn(_on_engines, type(self))[0], strict=True):
            if name in self.refuses or isinstance(found, str):
                assert self.refuses.get(name, "no refusal expected") in str(found), name
            else:
                _assert_close(found, expected, self.tolerance)

    def test_every_trained_tensor_gets_a_gradient(self) -> None:
        config = self.options()
        method, engine, loader = self.assemble(config)
        missing = {name for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
        # some gradients are zero at first (one factor of an adapter starts at zero), so a few steps are made
        for _ in range(3):
            batches = next(loader)
            targets = sum(method.targets(batch) for batch in batches)
            engine.start(config.lr)
            engine.accumulate(method, batches, targets)
            missing -= {name for name, parameter in engine.model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
            engine.step()
        assert not missing, f"trained, but without a gradient: {sorted(missing)}"

    def test_the_result_is_a_loadable_folder_and_a_resumed_finished_run_does_nothing(self, tmp_path: Path) -> None:
        result = self.run(tmp_path)
        assert result["reason"]["kind"] == "budget"
        assert result["progress"]["steps"] == STEPS
        before = _weights(tmp_path)
        again = self.run(tmp_path, resume="auto")
        assert again["progress"]["steps"] == STEPS
        for name, tensor in _weights(tmp_path).items():
            assert torch.equal(before[name], tensor)


def _run(kind: type[Conformance], folder: Path, changes: Mapping[str, Any]) -> None:
    logging.disable(logging.WARNING)
    kind().run(folder, **changes)


def _on_engines(kind: type[Conformance]) -> list[list[float] | str]:
    """Per engine of `ENGINES`, the losses of a few steps, or the message that refuses."""
    logging.disable(logging.WARNING)
    results: list[list[float] | str] = []
    for engine in ENGINES.values():
        try:
            results.append(_losses_of_steps(kind, {"micro_batch_size": GLOBAL_BATCH // torch.distributed.get_world_size(), **engine}))
        except ConfigError as refusal:
            results.append(str(refusal))
    return results


def _losses_of_steps(kind: type[Conformance], changes: Mapping[str, Any]) -> list[float]:
    suite = kind()
    config = suite.options(**changes)
    method, engine, loader = suite.assemble(config)
    return [train_step(engine, method, next(loader), config.lr).loss for _ in range(3)]


def _losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    return {f"{file.name}/{name}": tensor for file in sorted(newest.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _assert_close(actual: list[float], expected: list[float], tolerance: float) -> None:
    torch.testing.assert_close(
        torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=1e-6
    )
