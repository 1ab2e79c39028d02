from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.mdm_scaling.small import VOCABULARY, Table, network

from lm_core.data.vocab import byte_tokenizer
from lm_core.errors import ConfigError, InputError
from mdm_scaling.options import GenerateConfig
from mdm_scaling.sampling import FinishedBlocks, autoregressive, choose, encode, fill, guided, run
from mdm_scaling.sizes import shape


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
    settings: dict[str, Any] = {"top_k": 0, "top_p": 1.0, **options}
    drawn, _ = choose(logits, 4, torch.arange(4000), torch.zeros(4000, dtype=torch.long), 1, **settings)
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


# --- masked models ---

V, S = 2, 3
TABLE = Table(V, S, seed=4)


def probabilities(state: tuple[int, ...]) -> torch.Tensor:
    """p(token | state) at every position (S x V)."""
    return TABLE.logits(torch.tensor([state]))[0].softmax(-1)


def by_orders() -> dict[tuple[int, ...], float]:
    """Output distribution when masks are revealed one by one in a uniformly random order."""
    found = {}
    for outcome in itertools.product(range(V), repeat=S):
        total = 0.0
        for order in itertools.permutations(range(S)):
            state, p = [V] * S, 1.0
            for at in order:
                p *= float(probabilities(tuple(state))[at, outcome[at]])
                state[at] = outcome[at]
            total += p / math.factorial(S)
        found[outcome] = total
    return found


def by_steps(steps: int) -> dict[tuple[int, ...], float]:
    """Output distribution of the ancestral sampler, by enumeration of all states."""
    states = {(V,) * S: 1.0}
    for step in range(steps):
        chance, after = 1 / (steps - step), {}
        for state, weight in states.items():
            hidden = [at for at in range(S) if state[at] == V]
            p = probabilities(state)
            for reveal in itertools.product((False, True), repeat=len(hidden)):
                for tokens in itertools.product(range(V), repeat=sum(reveal)):
                    chosen, fresh, q = iter(tokens), list(state), weight
                    for at, revealed in zip(hidden, reveal):
                        q *= chance if revealed else 1 - chance
                        if revealed:
                            fresh[at] = next(chosen)
                            q *= float(p[at, fresh[at]])
                    if q:
                        after[tuple(fresh)] = after.get(tuple(fresh), 0.0) + q
        states = after
    return states


def sample(count: int = 4000, **options: Any) -> list[tuple[int, ...]]:
    start = torch.full((count, S), V)
    tokens, _, _ = fill(TABLE.logits, start, V, index=torch.arange(count), temperature=1.0, seed=5, **options)
    return [tuple(row) for row in tokens]


def chi_square(drawn: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    return sum((drawn.count(outcome) - len(drawn) * p) ** 2 / (len(drawn) * p) for outcome, p in expected.items())


def test_first_hitting_one_by_one_has_the_distribution_of_random_orders() -> None:
    assert sum(by_orders().values()) == pytest.approx(1.0)
    # 0.999 quantile of chi-square with 7 degrees of freedom
    assert chi_square(sample(sampler="first-hitting", steps=S), by_orders()) < 24.3


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_sampler_has_its_distribution(steps: int) -> None:
    assert chi_square(sample(sampler="ancestral", steps=steps), by_steps(steps)) < 24.3


def test_confidence_reveals_the_surest_first() -> None:
    start = torch.full((1, S), V)
    tokens, logprobs, evaluations = fill(TABLE.logits, start, V, S, index=torch.arange(1))
    state: list[int] = [V] * S
    for _ in range(S):
        p = probabilities(tuple(state))
        at = max((at for at in range(S) if state[at] == V), key=lambda at: (float(p[at].max()), -at))
        state[at] = int(p[at].argmax())
        assert logprobs[0][at] == pytest.approx(math.log(float(p[at].max())))
    assert (tokens[0], evaluations) == (state, S)


def test_quotas_divide_masks_among_steps_and_blocks() -> None:
    seen: list[int] = []

    def predict(ids: torch.Tensor) -> torch.Tensor:
        seen.append(int((ids == 7).sum()))
        return torch.zeros(len(ids), ids.shape[1], 8)

    fill(predict, torch.full((1, 7), 7), 7, 3, index=torch.arange(1))
    assert seen == [7, 4, 2]
    seen.clear()
    fill(predict, torch.full((1, 7), 7), 7, 3, 4, index=torch.arange(1))
    assert seen == [7, 5, 3]
    with pytest.raises(InputError, match="fewer than the 7 blocks"):
        fill(predict, torch.full((1, 7), 7), 7, 3, 1, index=torch.arange(1))


def test_blocks_of_one_go_from_left_to_right_and_prompts_stay() -> None:
    model = network("mdm")
    mask = VOCABULARY
    start = torch.tensor([[3, mask, 4, mask, mask]])
    states: list[list[int]] = []

    def predict(ids: torch.Tensor) -> torch.Tensor:
        states.append(ids[0].tolist())
        return model(input_ids=ids).logits

    tokens, _, _ = fill(predict, start, mask, 3, 1, index=torch.arange(1))
    assert [state.count(mask) for state in states] == [3, 2, 1]
    assert [[at for at, token in enumerate(state) if token == mask] for state in states] == [[1, 3, 4], [3, 4], [4]]
    assert (tokens[0][0], tokens[0][2]) == (3, 4)
    assert max(tokens[0]) < VOCABULARY


@pytest.mark.parametrize(
    "options",
    [{"sampler": "ancestral"}, {"sampler": "first-hitting"}, {"remasking": "random"}, {"remasking": "margin"}, {"remasking": "entropy"}],
)
def test_masked_samples_do_not_depend_on_their_neighbours(options: dict[str, Any]) -> None:
    model = network("mdm")
    start = torch.tensor([[3, VOCABULARY, 4, VOCABULARY, VOCABULARY, VOCABULARY]])

    def drawn(index: list[int]) -> list[list[int]]:
        found = fill(
            lambda ids: model(input_ids=ids).logits,
            start.repeat(len(index), 1),
            VOCABULARY,
            3,
            index=torch.tensor(index),
            temperature=1.0,
            seed=2,
            **options,
        )
        return found[0]

    together = drawn([0, 1, 2])
    assert together == [drawn([at])[0] for at in range(3)]
    assert len({tuple(row) for row in together}) > 1


def test_no_guidance_is_plain_and_guidance_is_its_formula() -> None:
    model, mask = network("mdm"), VOCABULARY
    ids = torch.tensor([[3, mask, 4, mask]])
    predict = lambda given: model(input_ids=given).logits  # noqa: E731
    prompt = ids != mask
    with torch.no_grad():
        assert torch.equal(guided(predict, ids, prompt, mask, 0.0), predict(ids))
        cond, uncond = predict(ids), predict(torch.full_like(ids, mask))
        torch.testing.assert_close(guided(predict, ids, prompt, mask, 2.0), uncond + 3 * (cond - uncond))


def test_masks_stand_in_prompts() -> None:
    tokenizer = byte_tokenizer()
    assert encode("a[MASK]b[MASK]", tokenizer, 259) == [97, 259, 98, 259]
    assert encode("", tokenizer, 259) == [tokenizer.eos_token_id]


def test_a_masked_run_writes_text(tmp_path: Path) -> None:
    model = network("mdm", vocabulary=259)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    result = run(
        GenerateConfig(checkpoint=str(tmp_path / "model"), prompt=["ab[MASK]c"], max_new_tokens=5, steps=3, out=tmp_path / "out.jsonl")
    )
    [line] = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["tokens"] == result["samples"][0]["tokens"]
    assert len(result["samples"][0]["tokens"]) == 9
    assert len(result["samples"][0]["logprobs"]) == 6
    with pytest.raises(InputError, match="is a masked model"):
        run(GenerateConfig(checkpoint=str(tmp_path / "model"), prompt=["a"], sampler="ar"))


# --- caches and traces ---


def masks_of(prompt: list[int], count: int) -> torch.Tensor:
    return torch.tensor([[*prompt, *[VOCABULARY] * count]] * 2)


def filled(model: Any, start: torch.Tensor, *, prefix: bool, **options: Any) -> Any:
    predict: Any = FinishedBlocks(model) if prefix else lambda ids: model(input_ids=ids).logits
    return fill(predict, start, VOCABULARY, index=torch.arange(2), temperature=1.0, seed=2, **options)


def test_keys_of_finished_blocks_are_exact_in_one_layer_and_in_the_first_step_of_a_block() -> None:
    start = masks_of([3, 4, 5], 8)
    one = network("mdm", sizes=shape(1, 32, 4, 8))
    for sampler in ("confidence", "ancestral", "first-hitting"):
        options = {"steps": 8, "block_length": 4, "sampler": sampler}
        found, expected = (filled(one, start, prefix=prefix, **options) for prefix in (True, False))
        assert found[0] == expected[0]
        torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), rtol=1e-4, atol=1e-5)
    two = network("mdm")
    found, expected = (filled(two, start, prefix=prefix, steps=2, block_length=4) for prefix in (True, False))
    assert found[0] == expected[0]
    # later steps of a block see keys that were made while more of it was masked
    found, expected = (filled(two, start, prefix=prefix, steps=8, block_length=4) for prefix in (True, False))
    assert found[1][0] != pytest.approx(expected[1][0], rel=1e-6)


def test_logits_that_are_kept_change_the_number_of_evaluations_alone() -> None:
    model, start = network("mdm"), masks_of([3], 3)
    kept, again = (filled(model, start, prefix=False, steps=12, sampler="ancestral", reuse=reuse) for reuse in (True, False))
    assert kept[:2] == again[:2]
    assert kept[2] < again[2]


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_a_trace_has_every_token_once_in_the_order_of_the_steps(objective: Any, tmp_path: Path) -> None:
    network(objective, vocabulary=259).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    config = GenerateConfig(
        checkpoint=str(tmp_path / "model"), prompt=["abc", "d"], num_samples=2, max_new_tokens=6, steps=3, trace=tmp_path / "trace.jsonl",
        cache="none", temperature=1.0,
    )  # fmt: skip
    samples = run(config)["samples"]
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    for number, sample in enumerate(samples):
        own = [line for line in lines if line["sample"] == number]
        assert [line["step"] for line in own] == sorted(line["step"] for line in own)
        first = 0 if objective == "mdm" else len(sample["prompt"])
        for line in own:
            assert [sample["tokens"][at - first] for at in line["positions"]] == line["tokens"]
        revealed = sorted(at for line in own for at in line["positions"])
        assert revealed == list(range(len(sample["prompt"]), len(sample["prompt"]) + len(sample["logprobs"])))


def test_keys_of_blocks_go_with_masked_models_without_guidance(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache: prefix goes without cfg_scale"):
        GenerateConfig(checkpoint="x", prompt=["a"], cache="prefix", cfg_scale=1.0)
    network("ar", vocabulary=259).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cache: prefix is of masked models"):
        run(GenerateConfig(checkpoint=str(tmp_path), prompt=["a"], cache="prefix"))
