"""Recurrent decoding: the tokens of transformers' generate, with and without this package, in constant memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv_distill.export import to_hf
from rwkv_distill.generate import choose, generate, penalised
from tests.rwkv_distill.small import student, tokens

# where neither this package nor the compiled operators are
ALONE = """
import sys
sys.modules.update(dict.fromkeys(("rwkv_distill", "kernels_cuda", "lm_core")))
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]])
mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    print(model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)[:, 5:].tolist())
    print(model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0).shape)
"""


@pytest.mark.parametrize("fields", [{}, {"preset": "rad"}, {"preset": "rad", "layers": [1]}], ids=str)
def test_greedy_tokens_are_those_of_transformers(fields: dict[str, Any]) -> None:
    model, ids = student("qwen2", **fields), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0)[:, 6:]
    assert torch.equal(generate(model, ids, attention_mask=mask, max_new_tokens=64), expected)


@pytest.mark.slow
def test_exported_folders_generate_the_same_without_this_package(tmp_path: Path) -> None:
    models = [student("qwen3", **fields) for fields in ({"preset": "arwkv"}, {"preset": "rad", "layers": [0, 2]}, {"rwkv_version": "v6"})]
    folders = [tmp_path / f"student{place}" for place in range(len(models))]
    for model, folder in zip(models, folders):
        to_hf(model, folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    run = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *map(str, folders)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    ids, mask = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    ours = [generate(model, ids, attention_mask=mask, max_new_tokens=24).tolist() for model in models]
    assert run.stdout.splitlines() == [line for tokens in ours for line in (str(tokens), "torch.Size([2, 9])")]


def test_padded_prompts_get_the_answers_of_prompts_alone() -> None:
    model = student()
    prompts = [tokens(1, 3, seed=2), tokens(1, 6, seed=3)]
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), prompts[0]], 1), prompts[1]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    together = generate(model, batch, attention_mask=mask, max_new_tokens=16)
    for row, prompt in zip(together, prompts):
        assert torch.equal(row, generate(model, prompt, max_new_tokens=16)[0])


def test_text_goes_on_from_a_state() -> None:
    model, ids = student(), tokens(1, 12)
    with torch.no_grad():
        state = model(ids[:, :7], return_state=True).state
    assert torch.equal(generate(model, ids[:, 7:], state=state, max_new_tokens=10), generate(model, ids, max_new_tokens=10))


def test_a_sequence_ends_with_its_end_token() -> None:
    model, ids = student(), tokens(1, 4)
    written = generate(model, ids, max_new_tokens=20)[0].tolist()
    end = written[5]
    stopped = generate(model, ids, max_new_tokens=20, eos_token_id=end)[0].tolist()
    assert stopped == written[: written.index(end) + 1]


def test_draws_repeat_by_seed_and_keep_to_the_likeliest() -> None:
    model, ids = student(), tokens(1, 4)
    drawn = [generate(model, ids, max_new_tokens=12, temperature=5.0, seed=seed).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert generate(model, ids, max_new_tokens=12, temperature=5.0, top_k=1).tolist() == generate(model, ids, max_new_tokens=12).tolist()
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(choose(logits, 1.0, 0.6, 0, generator).tolist()) == {0, 1}
    share = (choose(logits, 1.0, 1.0, 2, generator) == 0).float().mean()
    assert float(share) == pytest.approx(0.625, abs=0.03)


def test_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, ids = torch.randn(2, 9), torch.tensor([[1, 4, 4], [0, 8, 2]])
    used = torch.zeros(2, 9, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(penalised(logits, used, 1.7), RepetitionPenaltyLogitsProcessor(1.7)(ids, logits))
