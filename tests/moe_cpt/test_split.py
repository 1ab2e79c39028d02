from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lm_core.errors import InputError
from moe_cpt.split import Split, split_ffn
from tests.moe_cpt.small import dense_model


def test_a_random_split_is_a_partition_that_depends_on_seed_and_layer_alone() -> None:
    state = dense_model().state_dict()
    split, again = (split_ffn(state, "random", num_experts=8, seed=5) for _ in range(2))
    for indices in split.indices:
        assert indices.shape == (8, 8)
        assert sorted(indices.flatten().tolist()) == list(range(64))
    assert all(torch.equal(left, right) for left, right in zip(split.indices, again.indices))
    assert not torch.equal(split.indices[0], split.indices[1])
    assert not torch.equal(split.indices[0], split_ffn(state, "random", num_experts=8, seed=6).indices[0])


def test_experts_that_do_not_come_out_even_are_refused() -> None:
    with pytest.raises(InputError, match="num_experts: 7 experts do not divide the 64 neurons of a layer; use for example 4"):
        split_ffn(dense_model().state_dict(), "random", num_experts=7)


def test_a_split_survives_its_file(tmp_path: Path) -> None:
    split = split_ffn(dense_model().state_dict(), "random", num_experts=8, seed=5)
    split.save(tmp_path / "split.safetensors")
    read = Split.load(tmp_path / "split.safetensors")
    assert all(torch.equal(left, right) for left, right in zip(read.indices, split.indices))
    assert replace(read, indices=[]) == replace(split, indices=[])


@pytest.mark.parametrize(
    ("neuron", "message"),
    [(64, "neuron 64 is outside 0 to 63"), (7, "neuron 3 is missing|neuron 7 occurs 2 times")],
)
def test_a_file_that_is_no_partition_is_refused(neuron: int, message: str, tmp_path: Path) -> None:
    split = split_ffn(dense_model().state_dict(), "random", num_experts=8)
    at = (split.indices[1] == 3).nonzero()[0]
    split.indices[1][at[0], at[1]] = neuron
    split.save(tmp_path / "split.safetensors")
    with pytest.raises(InputError, match=f"layer 1: ({message})"):
        Split.load(tmp_path / "split.safetensors")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no")
    with pytest.raises(InputError, match="cannot be read"):
        Split.load(tmp_path / "x")
