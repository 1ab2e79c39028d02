"""What is particular to this op; what every op must do is in tests/test_ops.py."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda import testing
from kernels_cuda.beacon import rope_gather, rope_gather_append_
from kernels_cuda.beacon.rope_gather_append_.cases import make


@pytest.mark.parametrize("implementation", testing.implementations())
def test_what_is_appended_is_what_a_gather_gives_for_its_index(implementation: str) -> None:
    given = testing.moved(make(torch.float32, 3, 2, 9, 12, 16, skipped=0.3), device="cuda" if implementation == "cuda" else "cpu")
    before = {name: given[name].clone() for name in ("k_mem", "v_mem", "mem_len")}
    with testing.using(implementation):
        rope_gather_append_(**given)
        for b, held in enumerate(before["mem_len"].tolist()):
            src = given["src"][b][given["src"][b] >= 0][None]
            pos = held + torch.arange(src.shape[1], device=src.device)[None]
            row = rope_gather(given["k"][b : b + 1], given["v"][b : b + 1], src, pos, given["cos"], given["sin"])
            assert int(given["mem_len"][b]) == held + src.shape[1]
            for name, new in zip(("k_mem", "v_mem"), row, strict=True):
                assert torch.equal(given[name][b, :, held : held + src.shape[1]], new[0])
                assert torch.equal(given[name][b, :, :held], before[name][b, :, :held])
                assert torch.equal(given[name][b, :, held + src.shape[1] :], before[name][b, :, held + src.shape[1] :])
