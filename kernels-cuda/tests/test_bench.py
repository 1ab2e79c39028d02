"""The benchmark's report, on an op that takes no time."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda import bench
from kernels_cuda.head.linear_kl import bench as linear_kl


def test_report_names_the_op_its_floor_and_all_it_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ceilings", lambda dtype, device: (1e9, 1e9))
    shape = linear_kl.shape(4, 8, 16, torch.float32)
    first, *others = bench.report("head/linear_kl", shape, repeats=1).splitlines()
    assert first.startswith("head/linear_kl  fwd+bwd  M=4 D=8 V=16 float32")
    assert "floor 0.004096 ms (1 GFLOP/s, 1 GB/s)" in first
    assert [line.split("  ")[-1] for line in others] == [shape.baseline_name, "the reference"]


def test_functions_are_run_in_turns() -> None:
    order: list[str] = []
    shape = bench.Shape("", torch.float32, dict, lambda: order.append("ours"), lambda: order.append("baseline"), "", flops=0, bytes=0)
    bench.paired(shape, repeats=2)
    assert order == ["ours", "baseline"] * 4


def test_outputs_that_are_no_scalars_are_timed_backward_by_their_sum() -> None:
    def make() -> dict[str, torch.Tensor]:
        return {"x": torch.ones(3, requires_grad=True)}

    shape = bench.Shape("", torch.float32, make, lambda x: 2 * x, lambda x: (2 * x).sum(), "", flops=0, bytes=0)
    assert all(measured.cpu_seconds >= 0 for measured in bench.paired(shape, repeats=1))
