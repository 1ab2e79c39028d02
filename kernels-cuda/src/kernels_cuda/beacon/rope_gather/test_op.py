"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.beacon import rope_gather
from kernels_cuda.beacon.rope_gather.cases import make

each_implementation = pytest.mark.parametrize("implementation", testing.implementations())


@each_implementation
def test_scores_depend_on_the_distance_of_positions_alone(implementation: str) -> None:
    """Rotation as multiplication of complex numbers: moving query and key together changes no score."""
    given = testing.moved(make(torch.float64, 1, 1, 4, 4, 8), device="cuda" if implementation == "cuda" else "cpu")
    angle = torch.arange(40, dtype=torch.float64, device=given["k"].device)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01]).to(given["k"])
    place = torch.arange(4, device=angle.device)[None]
    with testing.using(implementation):
        scores = []
        for shift in (0, 7, 31):
            keys, values = rope_gather(given["k"], given["v"], place, place * 2 + shift, angle.cos(), angle.sin())
            scores.append(keys[0, 0] @ keys[0, 0].T)
            assert torch.equal(values, given["v"])
    assert not torch.allclose(scores[0], given["k"][0, 0] @ given["k"][0, 0].T)
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-12, atol=1e-12)


@each_implementation
def test_a_row_does_not_depend_on_the_others(implementation: str) -> None:
    given = testing.moved(make(torch.float32, 4, 2, 9, 12, 16, absent=0.2), device="cuda" if implementation == "cuda" else "cpu")
    with testing.using(implementation):
        whole = testing.results(rope_gather, given)["output 0"]
        some = {name: value[2:3] if name in ("k", "v", "src", "pos") else value for name, value in given.items()}
        alone = rope_gather(**some)[0]
    assert torch.equal(whole[2:3], alone)


def test_a_wrong_index_shows_where_nobody_looks_at_it() -> None:
    given = make(torch.float32, 1, 1, 4, 3, 8)
    k, v, pos, cos, sin = (given[name].detach() for name in ("k", "v", "pos", "cos", "sin"))
    out = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8)
    with testing.using("emulated"):
        rope_gather(**given)
        torch.ops.beacon_emulated.rope_gather_forward_(k, v, torch.tensor([[0, 4, -1]]), pos, cos, sin, *out)
    for found in out:
        assert found.isnan().all(-1).tolist() == [[[False, True, False]]]
