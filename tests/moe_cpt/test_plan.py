from __future__ import annotations

from typing import Any

import pytest
import torch

from lm_core.config import build
from lm_core.errors import ConfigError
from moe_cpt.config import TrainConfig
from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.model import LlamaMoEForCausalLM
from moe_cpt.plan import parameter_counts

LLAMA_7B = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32}
LLAMA_13B = {"vocab_size": 32000, "hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 13824, "num_attention_heads": 40}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def train_config(**options: Any) -> TrainConfig:
    return build(TrainConfig, {"model": "moe", "data": ["synthetic:markov"], **options})


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"max_length": 2048, "micro_batch_size": 16, "num_nodes": 6, "num_gpu_per_node": 8}, (63578, 768, 1572864)),
        (
            {"max_length": 4096, "micro_batch_size": 8, "accumulate": 4, "num_nodes": 14, "num_gpu_per_node": 8, "num_tokens": "200*10^9"},
            (13623, 3584, 14680064),
        ),
        ({"max_length": 2048, "micro_batch_size": 16, "num_nodes": 2, "num_gpu_per_node": 8}, (190734, 256, 524288)),
        ({"max_length": 2048, "micro_batch_size": 16, "accumulate": 2, "num_nodes": 1, "num_gpu_per_node": 8}, (190734, 256, 524288)),
    ],
    ids=["guide", "baseline and sheared", "lora", "fpt"],
)
def test_header_of_the_published_scripts(options: dict[str, Any], numbers: tuple[int, int, int]) -> None:
    header = train_config(**options).plan().header
    assert header == "max_steps: {}\nglobal batch size: {}\n#tokens/batch: {}".format(*numbers)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # the guide's evaluations and warm-up on 112 GPUs, and ones shorter than a step
        ({"eval_tokens": "2.5*10^9", "warmup_tokens": "1.5*10^9"}, ("170", 102)),
        ({"eval_tokens": 1, "warmup_tokens": 1}, ("1", 1)),
        ({"budget": "10B tokens", "warmup_tokens": "1B"}, ("0.1", 10**9)),
    ],
)
def test_intervals_in_tokens_are_whole_steps(options: dict[str, Any], expected: tuple[str, int]) -> None:
    job = {"max_length": 4096, "micro_batch_size": 8, "accumulate": 4, "num_nodes": 14, "num_gpu_per_node": 8, **options}
    made = train_config(**job, **TrainConfig.further_layers(job)[0])
    assert (made.eval_every, made.warmup) == expected


def test_intervals_in_tokens_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="eval_tokens: 16384 means eval_every 1, but eval_every is 3; drop one"):
        train_config(eval_tokens=16384, eval_every="3", max_steps=4, warmup=0)
    with pytest.raises(ConfigError, match="warmup_tokens: 16384 has no measure in a run of 2 hours"):
        train_config(warmup_tokens=16384, budget="2 hours", warmup=0.5)


def test_lengths_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_steps: 7, but --num-tokens 131072 makes 8 updates"):
        train_config(max_steps=7, num_tokens=131072, warmup=1)
    assert train_config(max_steps=8, num_tokens=131072, warmup=1).plan().max_steps == 8
    with pytest.raises(ConfigError, match="num_tokens: 100 is less than one batch of 16384"):
        train_config(num_tokens=100)
    with pytest.raises(ConfigError, match="max_steps: --budget '3 steps' sets the length already"):
        train_config(max_steps=7, budget="3 steps", warmup=1)


def test_routing_options_of_a_conversion_are_refused_without_one() -> None:
    with pytest.raises(ConfigError, match="gate_network: linear belongs to --from-dense"):
        train_config(gate_network="linear")
    with pytest.raises(ConfigError, match="num_selects: 9 of 8 experts"):
        train_config(from_dense="random", num_experts=8, num_selects=9)


@pytest.mark.parametrize(
    ("dense", "mixture", "expected"),
    [
        (LLAMA_7B, {"num_experts": 16, "num_selects": 4}, (6738415616, 6740520960, 3494129664)),
        (LLAMA_7B, {"num_experts": 16, "num_selects": 2}, (6738415616, 6740520960, 2953064448)),
        (LLAMA_7B, {"num_experts": 8, "num_selects": 2}, (6738415616, None, 3493074944)),
        (LLAMA_13B, {"num_experts": 16, "num_selects": 4}, (13015864320, None, None)),
        (SMOLLM2, {"num_experts": 16, "num_selects": 4}, (134515008, 134799168, 75079488)),
    ],
    ids=["7B 4/16", "7B 2/16", "7B 2/8", "13B", "SmolLM2 4/16"],
)
def test_parameter_counts_are_those_of_the_model(dense: dict[str, Any], mixture: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    fields = {**dense, **mixture, "gate_add_noise": False}
    counts = parameter_counts(fields)
    for found, known in zip((counts.dense, counts.total, counts.active), expected):
        assert known is None or found == known
    with torch.device("meta"):
        model = LlamaMoEForCausalLM(LlamaMoEConfig(**fields))
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == counts.total
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert counts.active == counts.total - experts + experts * fields["num_selects"] // fields["num_experts"]


def test_feed_forward_layers_of_13b() -> None:
    width = LLAMA_13B["hidden_size"] * LLAMA_13B["intermediate_size"] * LLAMA_13B["num_hidden_layers"]
    with_ffn, without = parameter_counts(LLAMA_13B).dense, parameter_counts({**LLAMA_13B, "intermediate_size": 0}).dense
    assert with_ffn - without == 3 * width == 8493465600


def test_clipped_cosine_stays_at_its_floor() -> None:
    from moe_cpt.schedule import clipped_cosine

    assert clipped_cosine(0.7951, 0.1) > 0.1
    assert clipped_cosine(0.7953, 0.1) == 0.1


def test_spellings_of_the_original_guide_mean_options_of_core() -> None:
    given = {"torch_dtype": "float32", "adam_beta2": 0.99, "report_to": "none", "max_train_samples": "100"}
    made = build(
        TrainConfig,
        {"model": "llama_test", "data": ["d"], "num_selects": 2, "max_steps": 50, "warmup": 0},
        given,
        *TrainConfig.further_layers(given),
    )
    assert (made.precision, made.betas, made.tensorboard) == ("fp32", (0.9, 0.99), False)
    assert made.limits().limits == {"steps": 100 // made.micro_batch_size}
    with pytest.raises(ConfigError, match="max_train_samples: 1 is less than one batch of 8"):
        build(TrainConfig, {"model": "llama_test", "data": ["d"], "max_train_samples": 1, "micro_batch_size": 8, "warmup": 0})


def test_plan_and_convert_are_functions_of_the_package_though_modules_have_their_names() -> None:
    config = build(TrainConfig, {"model": "x", "num_tokens": 10**9})
    import moe_cpt.convert

    assert moe_cpt.plan(config).max_steps == 10**9 // (8 * 2048)  # type: ignore[operator]
    with pytest.raises(TypeError, match="convert"):
        moe_cpt.convert()  # type: ignore[operator]
