"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.rwkv_distill import tmix_shift
from kernels_cuda.rwkv_distill.tmix_shift import reference
from kernels_cuda.rwkv_distill.tmix_shift.cases import make

each_implementation = pytest.mark.parametrize("implementation", ["reference", *testing.implementations()])


def by_loop(h: torch.Tensor, prev: torch.Tensor | None, seg: torch.Tensor, mus: torch.Tensor) -> torch.Tensor:
    """Token by token, remembering the last real one."""
    out = torch.zeros(len(mus), *h.shape)
    for row in range(len(h)):
        last, last_segment = torch.zeros_like(h[0, 0]) if prev is None else prev[row], None
        for token in range(h.shape[1]):
            segment = int(seg[row, token])
            if segment < 0:
                continue
            before = last if last_segment in (None, segment) else torch.zeros_like(last)
            out[:, row, token] = h[row, token] + (before - h[row, token]) * mus
            last, last_segment = h[row, token], segment
    return out


@each_implementation
@pytest.mark.parametrize("state", [False, True])
def test_agrees_with_a_loop_over_tokens(implementation: str, state: bool) -> None:
    arguments = make(torch.float32, 4, 30, 9, segments=0.25, padding=0.35, prev=state)
    with testing.using(implementation):
        found = tmix_shift(**arguments)
    torch.testing.assert_close(found, by_loop(**arguments))


@each_implementation
def test_padding_on_either_side_changes_nothing_and_gets_no_gradient(implementation: str) -> None:
    alone = make(torch.float32, 2, 6, 10, prev=True)
    with testing.using(implementation):
        expected = testing.results(tmix_shift, alone)
        for left, right in ((3, 0), (0, 2)):
            holes = [torch.full((2, count, 10), torch.nan) for count in (left, right)]
            h = torch.cat([holes[0], alone["h"].detach(), holes[1]], 1).requires_grad_()
            seg = torch.tensor([[-1] * left + [5] * 6 + [-1] * right] * 2)
            out = tmix_shift(h, alone["prev"], seg, alone["mus"])
            factors = torch.zeros_like(out)
            generator = torch.Generator().manual_seed(1)
            factors[:, :, left : left + 6] = (
                torch.rand(expected["output 0"].shape, generator=generator, dtype=torch.float64) + 0.5
            ).float()
            gradients = torch.autograd.grad(out, [h, alone["prev"], alone["mus"]], factors)
            torch.testing.assert_close(out[:, :, left : left + 6], expected["output 0"])
            torch.testing.assert_close(gradients[0][:, left : left + 6], expected["gradient of h"])
            torch.testing.assert_close(gradients[1], expected["gradient of prev"])
            torch.testing.assert_close(gradients[2], expected["gradient of mus"])
            assert not gradients[0][:, :left].any()
            assert not gradients[0][:, left + 6 :].any()


@each_implementation
def test_halves_with_a_state_equal_the_whole(implementation: str) -> None:
    arguments = make(torch.float32, 2, 9, 10)
    h, mus = arguments["h"], arguments["mus"]
    with testing.using(implementation):
        halves = torch.cat([tmix_shift(h[:, :4], None, None, mus), tmix_shift(h[:, 4:], h[:, 3], None, mus)], 2)
        assert torch.equal(halves, tmix_shift(h, None, None, mus))


def test_every_token_has_at_most_one_successor() -> None:
    source = reference.sources(make(torch.float32, 5, 40, 1, segments=0.2, padding=0.3)["seg"])
    successor = reference.successors(source)
    for row in range(5):
        pairs = {(int(found), token) for token, found in enumerate(source[row]) if found >= 0}
        assert pairs == {(token, int(found)) for token, found in enumerate(successor[row]) if found >= 0}


def test_refuses_a_second_derivative() -> None:
    arguments = make(torch.float32, 1, 3, 4)
    with testing.using("cpu"), pytest.raises(RuntimeError, match="the op has no second derivative"):
        torch.autograd.grad(tmix_shift(**arguments).sum(), arguments["h"], create_graph=True)
