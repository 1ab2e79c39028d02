"""DeepSpeed ZeRO 1 to 3, with offload to host memory, called directly; the caller decides when to step."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lm_core import deepspeed_settings, dist
from lm_core.engine import state
from lm_core.engine.base import Engine
from lm_core.engine.replicated import broadcast
from lm_core.errors import ConfigError, ResumeRefused, RunFailed
from lm_core.optim import freeze, param_groups

if TYPE_CHECKING:
    from lm_core.method import Method
    from lm_core.options import RunConfig

log = logging.getLogger(__name__)


class DeepSpeed(Engine):
    """Weights, gradients and optimizer state in flat partitions: for optimizers that treat every element alike.

    Parameters that a step does not use count as having a zero gradient. In bf16 the weights of forward and backward passes are
    bfloat16, masters, accumulated gradients and reductions float32.
    """

    kind = "deepspeed"
    # masters live in the optimizer's files: nothing can be taken out
    optimizer_files = ()

    def __init__(self, config: RunConfig, method: Method, model: nn.Module, device: torch.device) -> None:
        self.method, self.nonfinite = method, config.nonfinite
        self.device, self.seed = device, config.seed
        settings = deepspeed_settings.settings(config, dist.world())
        self.stage = settings["zero_optimization"]["stage"]
        dist.require_group(device)
        self.data_rank, self.data_world = dist.rank(), dist.world()
        freeze(model, method.param_rules())
        model = model.to(device)
        broadcast(model)
        groups = param_groups(model, method.param_rules(), config)
        self.trained = {name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
        self._shapes = {name: list(tensor.shape) for name, tensor in state.weights(model).items()}
        optimizer = method.optimizer(groups)
        if getattr(optimizer, "per_layer", False):
            raise ConfigError("engine: deepspeed keeps no whole gradient for layer-wise updates; use --engine replicated")
        # a buffer of this many elements is made whatever the model; DeepSpeed's default is 2 GB
        elements = sum(parameter.numel() for parameter in self.trained.values())
        settings["zero_optimization"].setdefault("reduce_bucket_size", min(elements, 500_000_000))
        self._description = state.describe(optimizer, self.trained)
        self._engine: Any
        self._zero: Any
        with redirect_stdout(sys.stderr):
            self._engine, self._zero, _, _ = _import(device).initialize(model=model, optimizer=optimizer, config=settings)
        self.model, self.optimizer = self._engine, self._zero

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over the ranks; the contract is a sum
        self._engine.backward(loss * self.data_world, scale_wrt_gas=False)

    def step(self) -> float | None:
        bad: list[str] = []

        def look() -> None:
            if not bad and self._zero.overflow:
                bad.extend(self._nonfinite())

        # DeepSpeed refuses an infinite norm by itself, but forgets the gradients at once: names are taken just before
        with _before(self._zero, _clearing(self._zero), look):
            self._engine.step()
        if self._engine.was_step_applied():
            return float(self._engine.get_global_grad_norm())
        if self.nonfinite == "stop":
            first = bad[0] if bad else "none (the squares overflow)"
            raise RunFailed(
                f"gradient: the norm is not finite; first parameter with a non-finite gradient: {first}; lower --lr, or go on with --nonfinite drop"
            )
        return None

    def _nonfinite(self) -> list[str]:
        from deepspeed.utils import safe_get_full_grad

        gradients = ((name, safe_get_full_grad(parameter)) for name, parameter in self.trained.items())
        return [name for name, gradient in gradients if gradient is not None and not bool(gradient.isfinite().all())]

    def drop(self) -> None:
        # a step whose norm is infinite: DeepSpeed then clears all it has gathered, wherever it keeps it
        name, infinite = _norm(self._zero)
        setattr(self._zero, name, lambda *args, **kwargs: infinite)
        try:
            self._engine.step()
        finally:
            delattr(self._zero, name)
        assert not self._engine.was_step_applied()

    def save(self, folder: Path) -> None:
        """`deepspeed/` in DeepSpeed's own format (pickles), `deepspeed.json`, which says how it was partitioned, `untrained.safetensors`."""
        try:
            self._engine.save_checkpoint(str(folder / "deepspeed"), tag=_TAG, exclude_frozen_parameters=True)
        except RuntimeError:
            # torch's writer says "unexpected pos" where the disk is full
            state.require_room(folder)
            raise
        # DeepSpeed's conversion leaves these out (0.19.8)
        untrained = {name: self._full(tensor) for name, tensor in self._untrained().items()}
        if untrained:
            dist.on_main(state.write_tensors, folder / "untrained.safetensors", untrained)
        about: dict[str, Any] = {"world": self.data_world, "stage": self.stage, "optimizer": self._description, "shapes": self._shapes}
        about["state"] = sorted({key for values in self._zero.optimizer.state.values() for key in values})
        dist.on_main(state.write_json, folder / "deepspeed.json", about)

    def load(self, folder: Path) -> None:
        """On another number of ranks the checkpoint is first converted to DeepSpeed's universal format."""
        about = json.loads((folder / "deepspeed.json").read_text())
        state.check_optimizer(self._description, about["optimizer"])
        for name, shape in about["shapes"].items():
            if self._shapes.get(name) != shape:
                raise ResumeRefused(
                    f"model: {name} is {shape} in the checkpoint and {self._shapes.get(name)} in this model; resume with the same model"
                )
        if len(self._shapes) > len(about["shapes"]):
            raise ResumeRefused(
                f"model: {sorted(self._shapes.keys() - about['shapes'].keys())[0]} is not in the checkpoint; resume with the same model"
            )
        if about["stage"] != self.stage:
            raise ResumeRefused(
                f"zero_stage: the checkpoint was written at stage {about['stage']}, this run uses {self.stage}; use --zero-stage {about['stage']}"
            )
        if about["world"] == self.data_world:
            self._engine.load_checkpoint(str(folder / "deepspeed"), tag=_TAG, load_module_strict=False)
        elif not set(about["state"]) <= _CONVERTIBLE:
            raise ResumeRefused(
                f"num_processes: the checkpoint was written by {about['world']}, this run has {self.data_world}, and DeepSpeed converts only what Adam "
                f"keeps, not {', '.join(sorted(set(about['state']) - _CONVERTIBLE))} of {about['optimizer']['class']}; resume on {about['world']}"
            )
        else:
            if dist.rank() == 0:
                log.warning("deepspeed: converting the checkpoint of %d processes for %d", about["world"], self.data_world)
            dist.on_main(_convert, folder / "deepspeed")
            self._load_universal(folder / "deepspeed")
            dist.barrier()
            dist.on_main(shutil.rmtree, folder / "deepspeed" / _UNIVERSAL)
        self._load_untrained(folder / "untrained.safetensors")

    def _load_untrained(self, path: Path) -> None:
        import deepspeed

        untrained = self._untrained()
        for name, value in state.read_tensors(path) if untrained else ():
            with deepspeed.zero.GatheredParameters(untrained[name], modifier_rank=0), torch.no_grad():
                untrained[name].copy_(value)

    def _untrained(self) -> dict[str, Tensor]:
        """Frozen parameters and buffers."""
        trained = {id(parameter) for parameter in self.trained.values()}
        return {name: tensor for name, tensor in state.weights(self._engine.module).items() if id(tensor) not in trained}

    def _full(self, tensor: Tensor) -> Tensor:
        """A tensor of the module, whole and on the CPU; of a trained one the float32 master."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if not isinstance(tensor, nn.Parameter):
            return tensor.detach().cpu()
        if tensor.requires_grad:
            return safe_get_full_fp32_param(tensor).detach().cpu()  # type: ignore[no-any-return]
        with deepspeed.zero.GatheredParameters(tensor):
            return tensor.detach().cpu().clone()

    def _load_universal(self, folder: Path) -> None:
        inner = self._zero.optimizer
        settings = [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]
        self._engine._config.load_universal_checkpoint = True
        try:
            self._engine.load_checkpoint(str(folder), tag=_UNIVERSAL, load_module_strict=False)
        finally:
            self._engine._config.load_universal_checkpoint = False
        # at stage 3 every group gets the settings of the first one, and all states share one step (deepspeed 0.19.8)
        for group, before in zip(inner.param_groups, settings, strict=True):
            group.update(before)
        for values in inner.state.values():
            if isinstance(values.get("step"), Tensor):
                values["step"] = values["step"].clone()

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._engine.module.state_dict(keep_vars=True).items():
            yield name, self._full(tensor)


_TAG = "zero"
_UNIVERSAL = f"{_TAG}_universal"
_CONVERTIBLE = {"step", "exp_avg", "exp_avg_sq"}


def _import(device: torch.device) -> Any:
    """DeepSpeed without its noise, and without compiling anything for a CPU."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # it asks for this even where one process needs no launcher
    os.environ.setdefault("LOCAL_RANK", "0")
    # deepspeed 0.19 calls collectives by names that torch 2.13 deprecates, several times a step
    warnings.filterwarnings("ignore", r".*is deprecated\. Please use `torch\.distributed", FutureWarning)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # a step that it refuses is reported by the loop; stdout belongs to --json
    deepspeed.utils.logger.setLevel(logging.ERROR)
    for handler in deepspeed.utils.logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    return deepspeed


def _norm(optimizer: Any) -> tuple[str, Any]:
    """The method that one of DeepSpeed's three wrappers gets its norm from, and what it returns when that is infinite (0.19)."""
    infinite = torch.tensor(math.inf)
    if hasattr(optimizer, "scaled_global_norm"):
        return "scaled_global_norm", infinite
    if hasattr(optimizer, "_get_norm_groups"):
        return "_get_norm_groups", [infinite]
    return "get_grads_for_norm", ([infinite], {})


def _clearing(optimizer: Any) -> str:
    """The method with which a wrapper forgets its gradients."""
    return "clear_hp_grads" if hasattr(optimizer, "clear_hp_grads") else "zero_grad"


@contextmanager
def _before(target: Any, name: str, action: Callable[[], Any]) -> Iterator[None]:
    """While in here, `action` runs before every call of the method `name` of `target`."""
    original = getattr(target, name)

    def both(*args: Any, **kwargs: Any) -> Any:
        action()
        return original(*args, **kwargs)

    setattr(target, name, both)
    try:
        yield
    finally:
        delattr(target, name)


def _convert(folder: Path) -> None:
    """`<tag>_universal` beside `<tag>`, by DeepSpeed's own converter."""
    from deepspeed.checkpoint.ds_to_universal import main

    output = folder / _UNIVERSAL
    shutil.rmtree(output, ignore_errors=True)
    # one worker each means this process
    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            main(Namespace(input_folder=str(folder / _TAG), output_folder=str(output), **settings))
    # it asserts and raises whatever comes
    except Exception as error:
        raise ResumeRefused(
            f"resume: DeepSpeed cannot convert {folder} to another number of processes ({error!r}); resume on as many as wrote it"
        ) from error
