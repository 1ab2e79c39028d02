from __future__ import annotations

import math

import torch
from tests.mdm_scaling.small import VOCABULARY, network

from mdm_scaling.sampling import autoregressive, choose


def test_the_cache_changes_nothing_but_time() -> None:
    model, prompt, index = network("ar"), torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.arange(2)
    for temperature in (0.0, 1.0):
        fast, slow = (
            autoregressive(model, prompt, 10, index=index, temperature=temperature, seed=3, cache=cache) for cache in (True, False)
        )
        assert fast[0] == slow[0]
        torch.testing.assert_close(torch.tensor(fast[1]), torch.tensor(slow[1]), rtol=1e-4, atol=1e-5)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    model, prompt = network("ar"), torch.tensor([[1, 2, 3]] * 3)
    together, _, _ = autoregressive(model, prompt, 8, index=torch.arange(3), temperature=1.0, seed=3)
    alone = [autoregressive(model, prompt[:1], 8, index=torch.tensor([i]), temperature=1.0, seed=3)[0][0] for i in range(3)]
    assert together == alone
    assert len({tuple(row) for row in together}) > 1


def test_greedy_tokens_and_log_probabilities_are_those_of_the_model() -> None:
    model = network("ar")
    tokens, scores, evaluations = autoregressive(model, torch.tensor([[1, 2, 3]]), 4, index=torch.arange(1))
    ids = torch.tensor([[1, 2, 3, *tokens[0]]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, 2:-1, :VOCABULARY].double().log_softmax(-1)
    assert logprobs.argmax(-1).tolist() == tokens[0]
    torch.testing.assert_close(torch.tensor(scores[0]), logprobs.amax(-1).float(), rtol=1e-4, atol=1e-5)
    assert evaluations == 4


def test_the_end_token_ends_a_sample() -> None:
    model = network("ar")
    first = autoregressive(model, torch.tensor([[1, 2, 3]]), 4, index=torch.arange(1))[0][0]
    assert (
        autoregressive(model, torch.tensor([[1, 2, 3]]), 4, index=torch.arange(1), end=first[1])[0][0] == first[: first.index(first[1]) + 1]
    )


def frequencies(**options: float) -> list[float]:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1).expand(4000, 4)
    drawn, _ = choose(logits, torch.arange(4000), torch.zeros(4000, dtype=torch.long), 1, **options)  # type: ignore[arg-type]
    return [float((drawn == token).double().mean()) for token in range(4)]


def test_draws_follow_the_distribution() -> None:
    for temperature in (1.0, 0.5):
        expected = (torch.tensor([2.0, 1.0, 0.0, -1.0]) / temperature).softmax(-1).tolist()
        for found, p in zip(frequencies(temperature=temperature), expected):
            assert abs(found - p) < 4 * math.sqrt(p * (1 - p) / 4000)


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    assert frequencies(temperature=1.0, top_k=1) == [1, 0, 0, 0]
    assert [found > 0 for found in frequencies(temperature=1.0, top_k=2)] == [True, True, False, False]
    # 0.644, 0.237, 0.087, 0.032
    assert [found > 0 for found in frequencies(temperature=1.0, top_p=0.6)] == [True, False, False, False]
    assert [found > 0 for found in frequencies(temperature=1.0, top_p=0.7)] == [True, True, False, False]


def test_ties_go_to_the_lowest_token() -> None:
    assert int(choose(torch.zeros(1, 5), torch.arange(1), torch.zeros(1, dtype=torch.long), 0)[0]) == 0
