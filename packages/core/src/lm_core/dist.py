"""The few distributed verbs that the rest of core uses. One process is a world of one, and every verb works there.

Collectives must be called by every rank in the same order (lockstep); nothing here hides a collective behind a rank.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from lm_core.errors import ConfigError, RunFailed

if TYPE_CHECKING:
    from lm_core.engine.base import Engine

Value = TypeVar("Value")


def init(device: str = "auto") -> torch.device:
    """This process's device; joins the process group when a launcher (torchrun, deepspeed, srun with torchrun) started it.

    `device` is auto, cpu or cuda. Raises ConfigError when cuda is asked for and absent.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError(
            "device: cuda is not available in this process; use --device cpu, or install a CUDA build of torch and expose a GPU"
        )
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if available and device != "cpu" else torch.device("cpu")
    if here.type == "cuda":
        torch.cuda.set_device(here)
        # read when cuBLAS is first used; without it equal runs may differ in their bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "RANK" in os.environ and not torch_dist.is_initialized():
        # gloo beside nccl: counters and Python objects travel without touching the GPU
        torch_dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo")
    return here


def require_group(device: torch.device) -> None:
    """Make a process group of one where there is none; sharded engines need a group even for one process."""
    if not torch_dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def close() -> None:
    """Leave the process group, if there is one."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def all_sum(tensor: Tensor, engine: Engine | None = None) -> Tensor:
    """A new tensor: the sum of `tensor` over the data ranks of `engine` (default: over all ranks).

    >>> all_sum(torch.tensor([1, 2]))
    tensor([1, 2])
    """
    total = tensor.detach().clone()
    if (world() if engine is None else engine.data_world) > 1:
        torch_dist.all_reduce(total, group=None if engine is None else engine.data_group)
    return total


def barrier() -> None:
    """Return when every rank has arrived."""
    if world() > 1:
        torch_dist.barrier()


def broadcast_object(value: Value) -> Value:
    """Rank 0's `value` on every rank; it must be picklable."""
    if world() == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def on_main(function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
    """Run `function` on rank 0 alone; its value, or its exception, reaches every rank.

    >>> on_main(max, 2, 3)
    3
    """
    outcome: tuple[Any, BaseException | None] = (None, None)
    if rank() == 0:
        try:
            outcome = (function(*args, **kwargs), None)
        except Exception as error:
            outcome = (None, error)
    value, failure = broadcast_object(outcome)
    if failure is not None:
        raise failure
    return value  # type: ignore[no-any-return]


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the body first, then everyone else: files that rank 0 makes exist when the others look."""
    if rank() != 0:
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()


def gather_objects(value: Value) -> list[Value]:
    """Every rank's `value`, in rank order, on every rank; they must be picklable."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    torch_dist.all_gather_object(values, value)
    return values


def agree(value: Value | None) -> Value | None:
    """The first rank's value that is not None, on every rank. Cheap while all are None: a reduction of one number."""
    if world() == 1 or not int(all_sum(torch.tensor(int(value is not None)))):
        return value
    return next(found for found in gather_objects(value) if found is not None)


def lost_a_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone; gloo says so in its text only."""
    return world() > 1 and (isinstance(error, torch_dist.DistError) or "gloo/" in str(error))


def same_on_all(value: Value, what: str) -> Value:
    """`value`, after checking that every rank passed an equal one. Raises RunFailed naming `what` and the values."""
    values = gather_objects(value)
    if any(other != values[0] for other in values):
        shown = ", ".join(f"rank {number}: {other!r}" for number, other in enumerate(values))
        raise RunFailed(f"{what}: differs between processes ({shown}); every rank must do the same work")
    return value


def relaunch(num_processes: int) -> None:
    """Run this very command as `num_processes` processes under torchrun's launcher, and exit with their exit code.

    Returns at once when one process is asked for, or when a launcher already started this one.
    """
    if num_processes <= 1 or "RANK" in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    # a signal reaches the processes through the launcher, which then waits this long for their checkpoint
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=f"relaunch-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    )
    try:
        elastic_launch(settings, sys.executable)(*sys.orig_argv[1:])
    except ChildFailedError as failure:
        _, first = failure.get_first_failure()
        # a negative code is the signal that ended the process; shells write it as 128 + signal
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except SignalException:
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)
