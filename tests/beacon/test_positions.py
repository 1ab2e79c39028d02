from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from beacon.options import TrainConfig
from beacon.positions import override_positions
from beacon.sizes import PRESETS
from lm_core.config import build
from lm_core.errors import ConfigError

BASE = PRESETS["llama_tiny"]
LONGEST = BASE["max_position_embeddings"]
WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
    ({"rope_method": "linear", "rope_factor": 4}, {"rope_type": "linear", "factor": 4.0}),
    ({"rope_method": "dynamic", "rope_factor": 2}, {"rope_type": "dynamic", "factor": 2.0}),
    (
        {"rope_method": "yarn", "rope_factor": 4, "rope_theta": 2e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 2e4, "original_max_position_embeddings": LONGEST},
    ),
    (
        {"rope_method": "llama3", "rope_factor": 8},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": LONGEST,
        },
    ),
]  # fmt: skip


def changed(kind: dict[str, Any] = BASE, **options: Any) -> Any:  # type: ignore[assignment]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kind))
    override_positions(model, build(TrainConfig, {"model": "llama_tiny", "data": ["synthetic:markov"], "output_dir": "x", **options}))
    return model


@pytest.mark.parametrize(("options", "rope"), WAYS, ids=lambda value: value.get("rope_method", "theta") if isinstance(value, dict) else "")
def test_other_positions_are_those_of_a_checkpoint_that_says_so(options: dict[str, Any], rope: dict[str, Any]) -> None:
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**BASE, "rope_parameters": {"rope_theta": 1e4, **rope}}))
    rows, model = torch.arange(40)[None], changed(**options)
    torch.testing.assert_close(model(rows).logits, expected(rows).logits, rtol=0, atol=0)
    assert not torch.equal(changed()(rows).logits, expected(rows).logits) or rope["rope_type"] == "dynamic"
    assert AutoConfig.for_model(**model.config.to_dict()).rope_parameters == expected.config.rope_parameters


def test_limits_of_positions_and_of_mistral_are_replaced() -> None:
    assert changed(max_position_embeddings=77).config.max_position_embeddings == 77
    mistral = {**BASE, "model_type": "mistral", "sliding_window": 16}
    assert [changed(mistral, mistral_sliding_window=size).config.sliding_window for size in (5, 0)] == [5, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_method": "yarn"}, "rope_factor: missing; --rope-method yarn"),
        ({"rope_factor": 2}, "rope_factor: 2, but this model scales no positions"),
        ({"mistral_sliding_window": 4}, "mistral_sliding_window: llama has none"),
        ({"rope_theta": 5e5, "save_format": "adapter"}, "save_format: adapter refers to a base with its own positions"),
    ],
)
def test_positions_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(**options)
