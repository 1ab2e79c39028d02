"""Held-out losses are means over targets, whatever the batches and ranks, with standard errors that tell the truth."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lm_core import dist
from lm_core.counter import uniform
from lm_core.engine.base import Engine
from lm_core.errors import InputError
from lm_core.evaluate import Score, Scores, evaluate, standard_error
from lm_core.method import IGNORE, Loss, Method
from lm_core.testing import spawn

VOCABULARY = 32


class Text:
    """Rows of random ids and lengths; the first position of each has no label."""

    def __init__(self, num_rows: int, seed: int = 0, labelled: bool = True):
        draw = np.random.default_rng(seed)
        self.rows = [torch.from_numpy(draw.integers(0, VOCABULARY, draw.integers(2, 9))) for _ in range(num_rows)]
        self.first = 1 if labelled else 9

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        labels = self.rows[k].clone()
        labels[: self.first] = IGNORE
        return {"input_ids": self.rows[k], "labels": labels}

    def collate(self, samples):
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([row["input_ids"] for row in samples], batch_first=True),
            "labels": pad([row["labels"] for row in samples], batch_first=True, padding_value=IGNORE),
            "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in samples], batch_first=True),
        }


class Table(Method):
    """The loss of a target is the entry of its id, so every mean has a closed form; one loss per half of the vocabulary."""

    def __init__(self):
        self.training = []

    def losses(self, model, batch):
        self.training.append((model.training, torch.is_grad_enabled()))
        labels = batch["labels"]
        for low in (True, False):
            chosen = labels[(labels != IGNORE) & ((labels < VOCABULARY // 2) == low)]
            nll = model(chosen).sum()
            rare = chosen == 5
            yield Loss(
                total=nll,
                metrics={"twice": 2 * nll, "rare": torch.stack([nll * 0 + 5.0 * rare.sum(), rare.sum().float()]), "noise": torch.rand(())},
            )


class Noisy(Method):
    """Noise by the address of each sample, as masked diffusion draws it."""

    def losses(self, model, batch):
        noise = uniform(batch.step, "eval", batch.index.clamp(min=0), batch["labels"].shape[1])
        yield Loss(total=noise[batch["labels"] != IGNORE].sum())


class Alone(Engine):
    """One of `world` ranks without an optimizer."""

    def __init__(self):
        self.model = nn.Sequential(nn.Embedding(VOCABULARY, 1), nn.Dropout(0.5))
        self.model[0].weight.data = torch.linspace(0.5, 4, VOCABULARY)[:, None].float()
        self.device = torch.device("cpu")
        self.data_rank, self.data_world, self.data_group = dist.rank(), dist.world(), None


TABLE = np.linspace(0.5, 4, VOCABULARY)


def expected(text: Text, rows: int) -> tuple[float, int]:
    losses = np.concatenate([TABLE[row[text.first :].numpy()] for row in text.rows[:rows]])
    return losses.mean(), len(losses)


def scored(text: Text, micro_batch: int, tokens: int = 0) -> Score:
    return evaluate(Alone(), Table(), {"docs": text}, micro_batch=micro_batch, tokens=tokens)["docs"]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 100])
def test_the_loss_is_the_mean_over_targets_for_any_batch_size(micro_batch):
    text = Text(23)
    score = scored(text, micro_batch)
    mean, targets = expected(text, 23)
    assert score.loss == pytest.approx(mean, rel=1e-6)
    assert (score.targets, score.tokens, score.samples) == (targets, sum(len(row) for row in text.rows), 23)
    assert score.metrics["twice"] == pytest.approx(2 * mean, rel=1e-6)
    assert score.metrics["rare"] == 5.0
    assert score.perplexity == pytest.approx(math.exp(mean), rel=1e-5)


def test_tokens_limit_the_rows():
    text = Text(23)
    whole, part = scored(text, 4), scored(text, 4, tokens=30)
    assert part.samples < whole.samples
    assert part.loss == pytest.approx(expected(text, part.samples)[0], rel=1e-6)
    assert part == scored(text, 4, tokens=30)


def _two_ranks() -> list[Score]:
    return [scored(Text(23), 2), scored(Text(23), 2, tokens=30), scored(Text(1), 2)]


@pytest.mark.slow
def test_two_ranks_score_as_one():
    ranks = spawn(_two_ranks)
    one = _two_ranks()
    assert ranks[0][:2] == ranks[1][:2]
    for single, pair in zip(one, ranks[0]):
        assert (pair.targets, pair.tokens, pair.samples) == (single.targets, single.tokens, single.samples)
        assert pair.loss == pytest.approx(single.loss, rel=1e-6)
        assert pair.metrics.get("rare") == single.metrics.get("rare")


def test_the_standard_error_is_that_of_a_ratio_of_row_sums():
    text = Text(40)
    sums = np.array([TABLE[row[1:].numpy()].sum() for row in text.rows])
    targets = np.array([len(row) - 1 for row in text.rows])
    mean = sums.sum() / targets.sum()
    assert scored(text, 1).standard_error == pytest.approx(np.std(sums - mean * targets, ddof=1) * math.sqrt(40) / targets.sum(), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 4])
def test_the_standard_error_is_the_spread_of_repeated_evaluations(rows):
    """Rows whose targets share a common part, as text does: batches as clusters see it, single targets would not."""
    draw = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(2000):
        targets = draw.integers(1, 20, 48)
        sums = targets * draw.normal(2.0, 0.5, 48) + draw.normal(0.0, 0.3, 48) * np.sqrt(targets)
        sums, targets = sums.reshape(-1, rows).sum(1), targets.reshape(-1, rows).sum(1)
        mean = sums.sum() / targets.sum()
        means.append(mean)
        errors.append(standard_error(((sums - mean * targets) ** 2).sum(), len(sums), targets.sum()))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.08)


def test_a_single_batch_has_no_standard_error():
    assert math.isnan(scored(Text(5), 8).standard_error)


def test_the_model_evaluates_without_gradients_and_comes_back_as_it_was():
    engine, method = Alone(), Table()
    engine.model.train()
    engine.model[1].eval()
    evaluate(engine, method, {"docs": Text(3)}, micro_batch=2)
    assert set(method.training) == {(False, False)}
    assert (engine.model.training, engine.model[0].training, engine.model[1].training) == (True, True, False)


def test_the_model_comes_back_after_an_error():
    engine = Alone()
    with pytest.raises(InputError):
        evaluate(engine, Table(), {"docs": Text(3, labelled=False)}, micro_batch=2)
    assert engine.model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("text", [Text(0), Text(3, labelled=False)])
def test_a_source_without_targets_is_refused_by_name(text):
    with pytest.raises(InputError, match="eval_data: docs holds no"):
        scored(text, 2)


def test_evaluations_repeat_bit_for_bit():
    torch.manual_seed(1)
    first = scored(Text(9), 2)
    torch.manual_seed(2)
    assert scored(Text(9), 2) == first


@pytest.mark.parametrize("micro_batch", [2, 3, 50])
def test_addressed_noise_does_not_depend_on_the_batch_size(micro_batch):
    one, many = (evaluate(Alone(), Noisy(None), {"docs": Text(23)}, micro_batch=size)["docs"] for size in (1, micro_batch))
    assert many.loss == pytest.approx(one.loss, rel=1e-6)


def test_scores_weigh_sources_by_their_targets():
    scores = Scores(docs=Score(2.0, 0.1, 30, 40, 4, {"kl": 0.5}), code=Score(1.0, math.nan, 10, 12, 1))
    assert scores.mean == 1.75
    record = scores.record()
    assert record.pop("eval/code/standard_error") != record.get("eval/docs/standard_error")
    assert record == {"eval/docs/loss": 2.0, "eval/docs/standard_error": 0.1, "eval/docs/kl": 0.5, "eval/code/loss": 1.0}
