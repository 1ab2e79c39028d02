"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.beacon import decode_attention, segment_merge


@pytest.mark.parametrize("implementation", testing.implementations())
def test_parts_of_a_memory_join_to_the_attention_over_all_of_it(implementation: str) -> None:
    """The softmax over all keys at once is the oracle, also for rows of which a part is empty."""
    device = "cuda" if implementation == "cuda" else "cpu"
    q, k, v = (torch.randn(3, 2, n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).to(device) for n in (1, 30, 31))
    v = v[:, :, :30]
    lengths = [(12, 18), (0, 7), (5, 0)]
    far, near = (torch.tensor(x, dtype=torch.int32, device=device) for x in zip(*lengths, strict=True))
    none = torch.zeros_like(far)
    with testing.using(implementation):
        one = decode_attention(q, k[:, :, :12], v[:, :, :12], far, k[:, :, 12:], v[:, :, 12:], none, 0.4)
        other = decode_attention(q, k[:, :, :12], v[:, :, :12], none, k[:, :, 12:], v[:, :, 12:], near, 0.4)
        out, lse = segment_merge(one[0][:, :, 0], one[1], other[0][:, :, 0], other[1])
    for b, (first, second) in enumerate(lengths):
        seen = [*range(first), *range(12, 12 + second)]
        scores = 0.4 * q[b] @ k[b, :, seen].transpose(1, 2)
        torch.testing.assert_close(out[b], (scores.softmax(-1) @ v[b, :, seen])[:, 0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[b], scores.logsumexp(-1)[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", testing.implementations())
def test_gradients_where_a_part_saw_nothing_go_to_the_other_alone(implementation: str) -> None:
    device = "cuda" if implementation == "cuda" else "cpu"
    out_a, out_b = (torch.randn(3, 4, device=device, requires_grad=True) for _ in "ab")
    lse_a, lse_b = (
        torch.tensor(x, device=device, requires_grad=True) for x in ([-torch.inf, 0.0, -torch.inf], [1.0, -torch.inf, -torch.inf])
    )
    with testing.using(implementation):
        out, lse = segment_merge(out_a, lse_a, out_b, lse_b)
        found = torch.autograd.grad([out, lse], [out_a, lse_a, out_b, lse_b], [torch.ones_like(out), torch.ones_like(lse)])
    assert torch.equal(out.detach(), torch.stack([out_b[0], out_a[1], 0 * out_a[2]]).detach())
    assert lse.tolist() == [1.0, 0.0, -torch.inf]
    assert [gradient.flatten().tolist() for gradient in found] == [
        [0.0] * 4 + [1.0] * 4 + [0.0] * 4, [0.0, 1.0, 0.0], [1.0] * 4 + [0.0] * 8, [1.0, 0.0, 0.0],
    ]  # fmt: skip
