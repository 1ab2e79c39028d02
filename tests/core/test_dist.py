import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm_core import dist
from lm_core.errors import ConfigError, RunFailed
from lm_core.testing import spawn


def test_one_process_is_a_world_of_one() -> None:
    value = torch.tensor([1.0, 2.0])
    assert (dist.rank(), dist.world()) == (0, 1)
    assert torch.equal(dist.all_sum(value), value)
    assert dist.all_sum(value) is not value
    assert dist.broadcast_object({"a": 1}) == {"a": 1}
    assert dist.same_on_all(3, "number") == 3
    with dist.main_first():
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_cuda_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="device: cuda is not available"):
        dist.init("cuda")


def _fail() -> None:
    raise ConfigError("field: wrong")


def _order(path: str) -> list[int]:
    with dist.main_first(), open(path, "a") as file:
        file.write(f"{dist.rank()}\n")
    dist.barrier()
    return [int(line) for line in Path(path).read_text().split()]


def _verbs(path: str) -> tuple[int, list[int]]:
    rank = dist.rank()
    assert dist.world() == 2
    value = torch.tensor([1.0, rank])
    assert dist.all_sum(value).tolist() == [2.0, 1.0]
    assert value.tolist() == [1.0, rank]
    assert dist.all_sum(torch.tensor(10**12)).item() == 2 * 10**12
    assert dist.broadcast_object(f"from {rank}") == "from 0"
    assert dist.on_main(lambda: rank) == 0
    with pytest.raises(ConfigError, match="field: wrong"):
        dist.on_main(_fail)
    with pytest.raises(RunFailed, match=r"rows: differs between processes \(rank 0: 0, rank 1: 1\)"):
        dist.same_on_all(rank, "rows")
    return rank, _order(path)


@pytest.mark.slow
def test_verbs_agree_on_two_processes(tmp_path: Path) -> None:
    first, second = spawn(_verbs, str(tmp_path / "order"))
    assert (first[0], second[0]) == (0, 1)
    assert first[1] == second[1] == [0, 1]


SCRIPT = """
import sys
from lm_core import dist
if __name__ == "__main__":
    dist.relaunch(2)
    dist.init("cpu")
    total = int(dist.all_sum(__import__("torch").tensor(dist.rank() + 1)))
    dist.close()
    print(f"total {total}", flush=True)
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.slow
def test_relaunch_runs_the_same_command_and_keeps_its_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, script, "4"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 4, done.stderr
    # the launcher ends the other process as soon as one has failed, maybe before it prints
    assert "total 3" in done.stdout


WAITING = """
import os, signal, sys, time
from lm_core import dist
if __name__ == "__main__":
    dist.relaunch(2)
    caught = []
    signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    os.write(1, b"ready\\n")  # in one piece, beside that of the other process
    while not caught:
        time.sleep(0.01)
    os.write(1, b"saved\\n")
    sys.exit(130)
"""


@pytest.mark.slow
def test_a_signal_reaches_every_process_of_a_relaunched_command(tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(WAITING)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert output.split() == ["saved"] * 2
