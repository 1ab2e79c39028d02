"""Checks that every op passes, found by its place in the tree; used by the test suite and, before it times anything, by the benchmark.

An op's `cases.py` holds CASES and REFUSED (arguments of the public function), kernel_calls() (of the compiled functions) and
calls() (of other ops it registers); the package itself holds the public function and `reference.py` its definition.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels_cuda.build import Kind
from kernels_cuda.choice import use

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One named input: `make(dtype)` gives the keyword arguments; the tensors to differentiate require grad."""

    name: str
    make: Callable[[torch.dtype], Arguments]
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    differentiable: bool = True  # False where gradients leave out, by definition, a part of what changes the outputs


@dataclass(frozen=True)
class Refused:
    """Arguments that must raise a ValueError whose message matches `message`."""

    name: str
    make: Callable[[], Arguments]
    message: str


@dataclass(frozen=True)
class Call:
    """One call of a registered op."""

    name: str
    arguments: tuple[Any, ...]
    kinds: Sequence[Kind] = ("cpu", "emulated")  # builds that have it

    def kernel(self, library: str) -> Any:
        """The op in torch.ops.<library>, where torch finds its schema."""
        return getattr(getattr(torch.ops, library), self.name).default

    def run(self, library: str) -> list[Tensor]:
        """All tensors after the call: those returned and copies of the arguments, which the kernel may have changed."""
        arguments = [value.detach().clone() if isinstance(value, Tensor) else value for value in self.arguments]
        output = self.kernel(library)(*arguments)
        returned = output if isinstance(output, tuple) else (output,)
        return [value for value in (*returned, *arguments) if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Op:
    """All that is known of one op folder."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    cases: Sequence[Case]
    refused: Sequence[Refused]
    calls: Sequence[Call]  # of every op it registers with torch
    kernels: Sequence[Call]  # of those that are compiled, hence found in <family>_emulated too

    @property
    def family(self) -> str:
        """Its folder, and its library in torch.ops."""
        return self.name.split("/")[0]


def find(name: str) -> Op:
    """The op in the folder `name`, such as "head/linear_cross_entropy"."""
    path, function = f"kernels_cuda.{name.replace('/', '.')}", name.split("/")[-1]
    package, reference, cases = (importlib.import_module(path + part) for part in ("", ".reference", ".cases"))
    kernels = cases.kernel_calls()
    return Op(
        name, getattr(package, function), getattr(reference, function), cases.CASES, cases.REFUSED, [*kernels, *cases.calls()], kernels
    )


def implementations() -> list[str]:
    """What can be tested here: the CPU twin, the CUDA sources run on the CPU, and the GPU if there is one."""
    return ["cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else [])]


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Kernels of one kind inside the block."""
    before = use(choice)
    try:
        yield
    finally:
        use(before)


def results(function: Callable[..., Any], arguments: Arguments) -> dict[str, Tensor]:
    """Outputs and the gradients of their sum with fixed random factors, by name, detached.

    A function whose name ends in _ changes its arguments: its outputs are copies of them after the call.
    """
    if function.__name__.endswith("_"):
        after = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
        function(**after)
        return {name: value for name, value in after.items() if isinstance(value, Tensor)}
    output = function(**arguments)
    outputs = {index: value for index, value in enumerate(output if isinstance(output, tuple) else (output,)) if value is not None}
    found = {f"output {index}": value for index, value in outputs.items()}
    leaves = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad}
    if leaves:
        generator = torch.Generator().manual_seed(1)
        roots = [value for value in outputs.values() if value.requires_grad]
        factors = [torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value) + 0.5 for value in roots]
        gradients = torch.autograd.grad(roots, list(leaves.values()), factors)
        found |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def moved(arguments: Arguments, *, device: str | None = None, dtype: torch.dtype | None = None) -> Arguments:
    """The arguments as leaves elsewhere; `dtype` changes the floating ones only. Strides survive."""

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(move(each) for each in value)
        if not isinstance(value, Tensor):
            return value
        new = value.detach().to(device=device, dtype=dtype if value.is_floating_point() else None)
        return new.requires_grad_(value.requires_grad)

    return {name: move(value) for name, value in arguments.items()}


def made(case: Case, dtype: torch.dtype, implementation: str) -> Arguments:
    """The case's arguments where the implementation wants them."""
    return moved(case.make(dtype), device="cuda" if implementation.startswith("cuda") else "cpu")


def check_accuracy(op: Op, case: Case, dtype: torch.dtype, implementation: str) -> None:
    """Errors against float64 are at most twice those of the reference in the same dtype, plus a few roundings.

    The roundings (one of the dtype, four of float32) are for results of a single value, where the reference may be right by luck.
    Integers are exactly those of the reference.
    """
    arguments = made(case, dtype, implementation)
    with using(implementation):
        ours = results(op.function, arguments)
    theirs = results(op.reference, arguments)
    exact = results(op.reference, moved(arguments, dtype=torch.float64))
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype, f"{name}: {ours[name].dtype} where the reference has {theirs[name].dtype}"
        assert ours[name].shape == truth.shape, f"{name}: shape {tuple(ours[name].shape)}, not {tuple(truth.shape)}"
        if truth.numel() == 0:
            continue
        if not truth.is_floating_point():
            assert torch.equal(ours[name], theirs[name]), f"{name}: differs from the reference"
            continue
        infinite = truth.isinf()
        assert torch.equal(ours[name][infinite].to(truth), truth[infinite]), f"{name}: differs where the truth is infinite"
        truth, mine, plain = (x.masked_fill(infinite, 0) for x in (truth, ours[name], theirs[name]))
        roundings = (torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps) * _largest(truth)
        error, allowed = _largest(mine - truth), 2 * _largest(plain - truth) + roundings
        assert error <= allowed, f"{name}: error {error:.3g} is above the {allowed:.3g} allowed (largest value {_largest(truth):.3g})"


def _largest(value: Tensor) -> float:
    return float(value.abs().max())


def check_same_bits(op: Op, case: Case, dtype: torch.dtype, implementation: str) -> None:
    """Two runs agree bit for bit; so do runs in which all fresh memory is filled with NaN."""
    arguments = made(case, dtype, implementation)
    with using(implementation):
        first, second = results(op.function, arguments), results(op.function, arguments)
        torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, on by default
        try:
            poisoned = results(op.function, arguments)
        finally:
            torch.use_deterministic_algorithms(False)
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name}: two runs differ"
        assert torch.equal(first[name], poisoned[name]), f"{name}: depends on memory that nobody wrote"


def check_gradients(op: Op, case: Case, implementation: str) -> None:
    """torch.autograd.gradcheck in float64."""
    arguments = made(case, torch.float64, implementation)
    leaves = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad}

    def function(*values: Tensor) -> Any:
        output = op.function(**{**arguments, **dict(zip(leaves, values, strict=True))})
        return tuple(value for value in output if value is not None) if isinstance(output, tuple) else output

    with using(implementation):
        assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


def check_guards(call: Call, library: str) -> None:
    """A kernel writes inside the tensors that its schema lets it change, and nowhere else."""
    kernel = call.kernel(library)
    guarded = [_Guarded(value) if isinstance(value, Tensor) else value for value in call.arguments]
    kernel(*(value.tensor if isinstance(value, _Guarded) else value for value in guarded))
    for argument, value in zip(kernel._schema.arguments, guarded, strict=True):
        if isinstance(value, _Guarded):
            value.check(argument.name, may_change=argument.alias_info is not None and argument.alias_info.is_write)


class _Guarded:
    """A tensor in the middle of a larger one whose ends hold NaN, or the largest integer."""

    size = 4096

    def __init__(self, value: Tensor) -> None:
        self.before = value.clone()
        self.around = value.new_full((value.numel() + 2 * self.size,), self._filler(value.dtype))
        self.tensor = self.around[self.size : self.size + value.numel()].view(value.shape)
        self.tensor.copy_(value)

    @staticmethod
    def _filler(dtype: torch.dtype) -> float | int:
        if dtype == torch.bool:
            return True
        return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max

    def check(self, name: str, *, may_change: bool) -> None:
        ends = torch.cat([self.around[: self.size], self.around[-self.size :]])
        untouched = torch.full_like(ends, self._filler(ends.dtype))
        assert torch.equal(_bits(ends), _bits(untouched)), f"{name}: written outside its bounds"
        if not may_change:
            assert torch.equal(_bits(self.tensor), _bits(self.before)), f"{name}: changed, though the schema says it is only read"
        elif self.tensor.is_floating_point():
            assert not self.tensor.isnan().any(), f"{name}: NaN from outside the bounds of an input"


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def verify(op: Op, implementation: str) -> None:
    """All of an op's accuracy and repeatability checks; raises AssertionError at the first that fails."""
    for case in op.cases:
        for dtype in case.dtypes:
            check_accuracy(op, case, dtype, implementation)
            check_same_bits(op, case, dtype, implementation)


@contextmanager
def thread_order(order: str) -> Iterator[None]:
    """Order in which emulated CUDA threads run: forward, reverse, or a seed."""
    os.environ["KERNELS_CUDA_THREADS"] = order
    try:
        yield
    finally:
        del os.environ["KERNELS_CUDA_THREADS"]
