"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_cuda import testing
from kernels_cuda.lowrank import pack_int4

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=600), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_implementation_gives_the_codes_of_the_reference(values: list[float], dtype: torch.dtype) -> None:
    """Bit for bit, for any finite numbers."""
    x = torch.tensor(values).to(dtype)
    with testing.using("reference"):
        expected = pack_int4(x)
    for implementation in ("cpu", "emulated"):
        with testing.using(implementation):
            for one, other in zip(pack_int4(x), expected, strict=True):
                assert torch.equal(one, other)


@each_implementation
def test_every_half_is_kept_as_it_is(implementation: str) -> None:
    """Offsets are rounded to half precision as torch does: all of its finite numbers, and what lies halfway between two of them."""
    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = (halves[:-1] + halves[1:]) / 2
    values = torch.cat([halves, -halves, middles, -middles])
    values = values[:: 7 if implementation == "emulated" else 1]
    x = values[:, None].expand(-1, 256).contiguous().to("cuda" if implementation == "cuda" else "cpu")
    with testing.using(implementation):
        zero = pack_int4(x)[2].cpu()
    assert torch.equal(zero, values.half())
