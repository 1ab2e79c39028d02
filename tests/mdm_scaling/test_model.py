from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.mdm_scaling.small import SHAPE, VOCABULARY, network
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lm_core.errors import ConfigError
from mdm_scaling.model import Objective, Scorer, fresh, load_network, objective_of, vocabulary_of, warm
from mdm_scaling.sizes import shape


def ids(batch: int = 3, size: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, size), generator=torch.Generator().manual_seed(seed))


def twin(model: Any) -> LlamaForCausalLM:
    """A stock Llama with the same weights."""
    values = {name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "is_causal", "auto_map")}
    stock = LlamaForCausalLM(LlamaConfig(**values))
    stock.load_state_dict(model.state_dict())
    return stock.train(False)


def test_ar_loss_and_gradients_are_those_of_a_stock_llama() -> None:
    model = network("ar", restrict_logits=False)
    stock, tokens = twin(model), ids(size=13)
    loss = Scorer(model)(tokens[:, :-1], tokens[:, 1:].flatten())
    logits = stock(input_ids=tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_mdm_is_a_stock_llama_under_a_mask_that_hides_nothing() -> None:
    model, tokens = network("mdm"), ids()
    mask = torch.zeros(3, 1, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=tokens).logits, twin(model)(input_ids=tokens, attention_mask=mask).logits, rtol=1e-5, atol=1e-5
        )


def test_restricted_logits_leave_mask_and_padding_out_of_the_softmax() -> None:
    model, tokens = network("ar"), ids(size=13)
    logits = twin(model)(input_ids=tokens[:, :-1]).logits[..., :VOCABULARY]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(Scorer(model)(tokens[:, :-1], tokens[:, 1:].flatten()), expected, rtol=1e-5, atol=1e-5)


def test_a_later_token_never_changes_ar_and_always_changes_mdm() -> None:
    first, second = ids(1), ids(1)
    second[0, 7] = (second[0, 7] + 1) % VOCABULARY
    with torch.no_grad():
        ar, mdm = network("ar"), network("mdm")
        assert torch.equal(ar(input_ids=first).logits[0, :7], ar(input_ids=second).logits[0, :7])
        changed = (mdm(input_ids=first).logits - mdm(input_ids=second).logits).abs().amax(-1)
        assert bool((changed > 0).all())


def test_moving_tokens_with_their_positions_moves_the_outputs_of_mdm() -> None:
    model, tokens = network("mdm"), ids(1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        moved = model(input_ids=tokens[:, order], position_ids=order[None]).logits
    torch.testing.assert_close(moved, plain[:, order], rtol=1e-4, atol=1e-5)


def test_padding_is_seen_by_nobody() -> None:
    model, tokens = network("mdm"), ids(1)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 9:] = 0
    with torch.no_grad():
        padded = model(input_ids=tokens, attention_mask=mask).logits[:, :9]
        torch.testing.assert_close(padded, model(input_ids=tokens[:, :9]).logits, rtol=1e-5, atol=1e-5)


def test_chosen_rows_and_weights() -> None:
    model, tokens = network("mdm"), ids()
    scorer, rows = Scorer(model), torch.tensor([1, 5, 30])
    weights = torch.tensor([0.5, 2.0, 3.0])
    each = scorer(tokens, tokens.flatten()[rows], rows, reduction="none")
    everything = scorer(tokens, tokens.flatten(), reduction="none")
    torch.testing.assert_close(each, everything[rows])
    torch.testing.assert_close(scorer(tokens, tokens.flatten()[rows], rows, weights), (each * weights).sum())


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_biases_begin_at_zero_and_are_saved(objective: Objective, tmp_path: Path) -> None:
    plain, model = network(objective), network(objective, sizes=replace(SHAPE, bias=True))
    biases = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 2 * 7
    assert not any(bias.any() for bias in biases.values())
    given = ids()
    # drawing the biases moved the other draws
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(model(given).logits, plain(given).logits)
    with torch.no_grad():
        for bias in biases.values():
            bias.fill_(0.1)
    model.save_pretrained(tmp_path)
    read = load_network(str(tmp_path))
    torch.testing.assert_close(read(given).logits, model(given).logits)
    assert not torch.equal(read(given).logits, plain(given).logits)


def test_no_row_gives_a_zero_with_a_gradient() -> None:
    model, tokens = network("mdm"), ids()
    none = torch.empty(0, dtype=torch.long)
    loss = Scorer(model)(tokens, none, none, torch.empty(0))
    loss.backward()
    assert float(loss.detach()) == 0


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_saved_model_reads_back_bit_for_bit(objective: Any, tmp_path: Path) -> None:
    model, tokens = network(objective), ids()
    model.save_pretrained(tmp_path)
    read = load_network(str(tmp_path))
    assert objective_of(read) == objective
    assert (vocabulary_of(read), read.config.mask_token_id) == (VOCABULARY, VOCABULARY)
    assert torch.equal(read(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_warm_start_keeps_weights_and_adds_rows(objective: Any) -> None:
    source = network("ar", vocabulary=47, divisible_by=1)  # 48 rows: 47 and a mask
    source.config.real_vocab_size = None
    before = source.state_dict()["model.embed_tokens.weight"].clone()
    model = warm(objective, source, std=0.02, divisible_by=8, restrict_logits=True, seed=3)
    rows = model.state_dict()["model.embed_tokens.weight"]
    assert (vocabulary_of(model), len(rows)) == (48, 56)
    assert torch.equal(rows[:48], before)
    torch.testing.assert_close(rows[48], before.mean(0))
    assert 0.01 < float(rows[49:].std()) < 0.03
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = warm(objective, source, std=0.02, divisible_by=8, restrict_logits=True, seed=3)
    assert torch.equal(rows, again.state_dict()["model.embed_tokens.weight"])


def test_output_projections_begin_smaller() -> None:
    model = network("ar", std=0.02)
    deviation = {name: float(parameter.detach().std()) for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert deviation["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(0.02, rel=0.1)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert deviation[f"model.layers.0.{name}.weight"] == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_heads_may_be_narrower_than_the_model(objective: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tied": True, "positions": 64, "theta": 10000.0, "eps": 1e-5, "std": 0.2, "divisible_by": 8}
    model = fresh(objective, shape(2, 36, 5, 6), VOCABULARY, **options, restrict_logits=True, seed=0).train(False)
    model.save_pretrained(tmp_path)
    read = load_network(str(tmp_path))
    assert objective_of(read) == objective
    assert torch.equal(read(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_dropout_acts_only_in_training_and_has_the_right_rate() -> None:
    model, tokens = network("mdm"), ids()
    plain = Scorer(model)(tokens, tokens.flatten())
    scorer = Scorer(network("mdm"), attention_dropout=0.5, hidden_dropout=0.25)
    assert torch.equal(scorer.train(False)(tokens, tokens.flatten()), plain)
    scorer.train()
    embedded: Any = scorer.model.model.embed_tokens
    dropped = embedded(torch.arange(VOCABULARY))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (embedded.weight[:VOCABULARY] / 0.75)[kept])
    assert 0.7 < float(kept.float().mean()) < 0.8
    assert not torch.equal(scorer(tokens, tokens.flatten()), plain)


def test_a_model_of_another_kind_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    with pytest.raises(ConfigError, match="gpt2 is not Llama-shaped"):
        warm("mdm", gpt, std=0.02, divisible_by=8, restrict_logits=True, seed=0)
