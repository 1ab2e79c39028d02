from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.mdm_scaling.test_method import batch, method

from kernels_cuda.mdm import token_mask_keep
from lm_core import counter
from mdm_scaling import experiments, flex
from mdm_scaling.method import Pretrain

# on a CPU Flex runs by plain operations and says so; the oracle is what counts here
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
INDEX = torch.tensor([3, 2**33 + 1])
SEED = 2**64 - 5


def tensors(heads: int = 4, size: int = 150) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    kinds = (heads, 2, 2)
    return tuple(torch.randn(2, count, size, 8, dtype=torch.float64, generator=generator) for count in kinds)


@pytest.mark.parametrize("mode", ["attention", "column"])
def test_fused_and_materialised_token_masks_agree(mode: str) -> None:
    query, key, value = tensors()
    size, ratio, eps = query.shape[2], 0.6, 1e-3
    mask = flex.token_mask(mode, size, ratio, eps, SEED, INDEX)
    fused = flex.attention(query, key, value, mask, scale=0.3, dropout=0.0, seed=torch.tensor(0))
    seen = experiments.seen(mode, size, ratio, eps, SEED, INDEX)  # type: ignore[arg-type]
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("mode", ["attention", "column"])
def test_a_kept_pair_is_a_draw_at_the_address_that_the_specification_gives(mode: str) -> None:
    """Element by element from the published counter, as a second writing in Python integers."""
    size, ratio, eps, number = 6, 0.7, 0.1, 2**40 + 9

    def words(block: int) -> tuple[int, ...]:
        return counter.philox((*counter.halves(number), block, counter.number("mask")), counter.halves(SEED))

    def unit(word: int) -> float:
        return (word >> 8) * 2.0**-24

    place = torch.arange(size)
    stream = counter.number("mask")
    found = token_mask_keep(SEED, stream, torch.tensor(number), place[:, None], place, size, ratio, eps, mode)  # type: ignore[arg-type]
    for i in range(size):
        for j in range(size):
            selected, chance, *_ = words(2**31 + (i if mode == "attention" else j))
            hidden = unit(selected) < ratio
            if mode == "attention":
                hidden &= unit(words((i * size + j) // 4)[(i * size + j) % 4]) < eps + (1 - eps) * unit(chance)
            assert bool(found[i, j]) == (j == i or (j < i and not hidden))


def test_places_of_pairs_end_where_their_words_do() -> None:
    place = torch.tensor(65535)
    assert bool(token_mask_keep(1, 3, torch.tensor(0), place, place, 65536, 1.0, 0.5, "attention"))
    with pytest.raises(ValueError, match="seq_len: 65537 is no number of tokens"):
        token_mask_keep(1, 3, torch.tensor(0), place, place, 65537, 1.0, 0.5, "attention")
    with pytest.raises(ValueError, match="mode: 'input' is not known"):
        token_mask_keep(1, 3, torch.tensor(0), place, place, 8, 1.0, 0.5, "input")  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [0.3, 0.9])
def test_flex_with_dropout_is_softmax_and_then_dropout(dropout: float) -> None:
    query, key, value = tensors()
    heads, size = query.shape[1:3]
    mask = flex.token_mask("attention", size, 0.6, 1e-3, SEED, INDEX)
    seen = experiments.seen("attention", size, 0.6, 1e-3, SEED, INDEX)
    seed = torch.tensor(77)
    found = flex.attention(query, key, value, mask, scale=0.3, dropout=dropout, seed=seed)
    scores = torch.where(seen, 0.3 * query @ key.repeat_interleave(2, 1).transpose(2, 3), -torch.inf)
    draws = counter.uniform(77, "dropout", list(range(2 * heads)), size * size).view(2, heads, size, size)
    keep = draws >= dropout
    weights = scores.softmax(-1) * keep / (1 - dropout)
    torch.testing.assert_close(found, weights @ value.repeat_interleave(2, 1), rtol=1e-9, atol=1e-10)
    # a first query that loses its only key is worth 0
    assert bool((found[:, :, 0] == 0).any())
    share = float(keep.double().mean())
    assert abs(share - (1 - dropout)) < 4 * (dropout * (1 - dropout) / keep.numel()) ** 0.5


def test_a_run_that_asks_a_function_has_the_loss_of_one_that_has_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss() -> float:
        made = method(objective="ar", randmask_ratio=0.6, randmask_mode="attention")
        module = made.build().train()
        with torch.no_grad():
            return float(sum(loss.total for loss in made.losses(module, batch())))

    plain = loss()
    monkeypatch.setattr(Pretrain, "fused", lambda self, ids: True)
    assert loss() == pytest.approx(plain, rel=1e-6)


def test_a_saved_model_does_not_ask_for_this_attention(tmp_path: Path) -> None:
    made = method(objective="ar", randmask_ratio=0.6, randmask_mode="attention")
    made.hf_model(made.build()).save_pretrained(tmp_path)
    assert flex.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
