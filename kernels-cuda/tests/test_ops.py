"""Properties of every op, found by its folder: see kernels_cuda.testing."""

from __future__ import annotations

import doctest
import sys

import pytest
import torch

from kernels_cuda import build, testing

OPS = [testing.find(name) for name in build.ops()]
GRADIENT_CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in OPS
    for case in op.cases
    if case.differentiable and any(isinstance(value, torch.Tensor) and value.requires_grad for value in case.make(torch.float64).values())
]
TYPED_CASES = [
    pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
    for op in OPS
    for case in op.cases
    for dtype in case.dtypes
]
CALLS = [pytest.param(op, call, id=f"{op.name}-{call.name}-{index}") for op in OPS for index, call in enumerate(op.calls)]
KERNEL_CALLS = [pytest.param(op, call, id=f"{op.name}-{call.name}-{index}") for op in OPS for index, call in enumerate(op.kernels)]
each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


@each_implementation
@pytest.mark.parametrize(("op", "case", "dtype"), TYPED_CASES)
def test_error_is_at_most_twice_that_of_the_reference(op: testing.Op, case: testing.Case, dtype: torch.dtype, implementation: str) -> None:
    testing.check_accuracy(op, case, dtype, implementation)


@each_implementation
@pytest.mark.parametrize(("op", "case", "dtype"), TYPED_CASES)
def test_same_bits_from_run_to_run_and_on_poisoned_memory(
    op: testing.Op, case: testing.Case, dtype: torch.dtype, implementation: str
) -> None:
    testing.check_same_bits(op, case, dtype, implementation)


@pytest.mark.parametrize(("op", "call"), [call for call in KERNEL_CALLS if "cpu" in call.values[1].kinds])
def test_kernel_gives_the_same_bits_for_one_and_two_threads(op: testing.Op, call: testing.Call) -> None:
    build.load(op.name, "cpu")
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(call.run(op.family))
    torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("order", ["reverse", "1", "2"])
@pytest.mark.parametrize(("op", "case", "dtype"), TYPED_CASES)
def test_cuda_source_does_not_depend_on_the_order_of_threads(op: testing.Op, case: testing.Case, dtype: torch.dtype, order: str) -> None:
    with testing.using("emulated"):
        expected = testing.results(op.function, case.make(dtype))
        with testing.thread_order(order):
            found = testing.results(op.function, case.make(dtype))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@each_implementation
@pytest.mark.parametrize(("op", "case"), GRADIENT_CASES)
def test_gradients_match_finite_differences(op: testing.Op, case: testing.Case, implementation: str) -> None:
    if sum(value.numel() for value in case.make(torch.float64).values() if isinstance(value, torch.Tensor)) > 5000:
        pytest.skip("other cases cover it, in less time")
    testing.check_gradients(op, case, implementation)


@pytest.mark.parametrize(
    ("op", "call", "implementation"),
    [pytest.param(*call.values, kind, id=f"{call.id}-{kind}") for call in KERNEL_CALLS for kind in call.values[1].kinds],
)
def test_kernel_stays_in_bounds(op: testing.Op, call: testing.Call, implementation: build.Kind) -> None:
    build.load(op.name, implementation)
    testing.check_guards(call, op.family if implementation == "cpu" else f"{op.family}_emulated")


@pytest.mark.parametrize(("op", "call"), CALLS)
def test_opcheck(op: testing.Op, call: testing.Call) -> None:
    kind = call.kinds[0]
    build.load(op.name, kind)
    compiled = any(call is kernel for kernel in op.kernels)
    with testing.using(kind):
        torch.library.opcheck(call.kernel(f"{op.family}_emulated" if kind == "emulated" and compiled else op.family), call.arguments)


@pytest.mark.parametrize(
    ("op", "refused"), [pytest.param(op, refused, id=f"{op.name}-{refused.name}") for op in OPS for refused in op.refused]
)
def test_bad_arguments_are_named(op: testing.Op, refused: testing.Refused) -> None:
    with testing.using("cpu"), pytest.raises(ValueError, match=refused.message):
        op.function(**refused.make())


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
def test_traces_as_one_graph(op: testing.Op) -> None:
    case = op.cases[0]
    with testing.using("cpu"):
        expected = testing.results(op.function, case.make(torch.float32))
        found = testing.results(torch.compile(op.function, fullgraph=True, backend="aot_eager"), case.make(torch.float32))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
def test_example_runs(op: testing.Op) -> None:
    result = doctest.testmod(sys.modules[op.function.__module__])
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", build.ops())
def test_folder_is_complete(name: str) -> None:
    expected = ["__init__.py", "reference.py", "binding.py", "cases.py", "test_op.py", "bench.py", "op.h", "op.cpp", "op.cu", "NOTES.md"]
    assert not set(expected) - {file.name for file in (build.PACKAGE / name).iterdir()}
