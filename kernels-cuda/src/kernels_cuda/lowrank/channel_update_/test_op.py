"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_cuda import testing
from kernels_cuda.lowrank import channel_update_
from kernels_cuda.lowrank.channel_update_ import binding
from kernels_cuda.lowrank.channel_update_.cases import make
from kernels_cuda.lowrank.lowrank_update_.reference import round_at_random

each_implementation = pytest.mark.parametrize("implementation", ["reference", *testing.implementations()])
types = st.sampled_from([torch.float32, torch.bfloat16])


@each_implementation
def test_the_norm_grows_by_gamma_at_most_and_zero_limits_nothing(implementation: str) -> None:
    device = "cuda" if implementation == "cuda" else "cpu"
    q, one = torch.zeros((), device=device), torch.ones(1, device=device)
    seen = []
    with testing.using(implementation):
        for size in (0.0, 3.0, 30.0, 1.0, 1.005):
            W = torch.zeros(2, 2, device=device)
            channel_update_(W, torch.tensor([[size, 0.0], [0.0, 0.0]], device=device), one, 1, q, 1.01, -1.0)
            seen.append(float(W[0, 0]))
            assert float(q) == pytest.approx(seen[-1])
    assert seen == pytest.approx([0.0, 3.0, 3.03, 1.0, 1.005])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(0, 1),
    st.integers(0, 9),
    types,
    types,
    types,
    st.booleans(),
    st.sampled_from([0.0, 1.0]),
)
def test_every_implementation_is_the_definition(
    m: int,
    n: int,
    axis: int,
    r: int,
    dtype: torch.dtype,
    gradient: torch.dtype,
    basis: torch.dtype,
    one: bool,
    last: float,
) -> None:
    arguments = make(dtype, m, n, axis, r=r, one=one, last=last, gradient=gradient, basis=basis)
    with testing.using("reference"):
        exact = testing.results(channel_update_, arguments)
    scale = float(exact["W"].double().abs().max()) + 1
    halves = r > 0 and basis == torch.bfloat16 and dtype == torch.bfloat16
    if halves:
        # a product of bfloat16 numbers may be rounded once more
        scale += float(arguments["P"].double().abs().sum() * arguments["N"].double().abs().max())
    for implementation in ("cpu", "emulated"):
        with testing.using(implementation):
            found = testing.results(channel_update_, arguments)
        tolerance = 2**-7 if dtype == torch.bfloat16 or halves else 1e-5
        assert float((found["W"].double() - exact["W"].double()).abs().max()) <= tolerance * scale
        torch.testing.assert_close(found["prev_norm"], exact["prev_norm"], rtol=1e-5, atol=0)


@each_implementation
@pytest.mark.parametrize("axis", [0, 1])
def test_kernels_draw_the_bits_of_the_reference(axis: int, implementation: str) -> None:
    """Those of `lowrank_update_`: one third of a step tells which were drawn."""
    device = "cuda" if implementation == "cuda" else "cpu"
    W = torch.ones(30, 41, dtype=torch.bfloat16, device=device)
    G = torch.full((30, 41), 0.5, device=device)
    with testing.using(implementation):
        channel_update_(W, G, torch.full(((30, 41)[axis],), 2.0**-7 / 3, device=device), axis, None, 1.0, 1.0, seed=11, offset=5)
    assert torch.equal(W.cpu(), round_at_random(1 - torch.full((30, 41), 2.0**-8 / 3), 11, 5))


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_of_rows_change_nothing(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make(torch.float32, 50, 37, axis, r=6)
    monkeypatch.setattr(binding, "multiplies", lambda *_: False)
    with testing.using("cpu"):
        whole = testing.results(channel_update_, arguments)["W"]
        monkeypatch.setattr(binding, "SLICE_BYTES", {"cpu": 4 * 37 * 7})
        sliced = testing.results(channel_update_, arguments)["W"]
    torch.testing.assert_close(sliced, whole, rtol=1e-6, atol=1e-6)
