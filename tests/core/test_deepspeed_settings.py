"""The file of --deepspeed-config: taken over where no option decides, refused where it contradicts one."""

import json
from pathlib import Path
from typing import Any

import pytest

from lm_core.deepspeed_settings import settings
from lm_core.errors import ConfigError
from lm_core.testing import spawn
from tests.core.engine_cases import equal, options, run, tiny, weights

# those of the engines; a guide brings its own besides, by another name
SHIPPED = sorted((Path(__file__).parents[2] / "launchers/conf/deepspeed").glob("zero*.json"))


def written(folder: Path, **content: Any) -> Path:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(content))
    return path


def of(folder: Path, content: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return settings(options(**{"engine": "auto", "deepspeed_config": written(folder, **content), **changed}), world=2)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_shipped_file_says_stage_and_offload_by_its_name(path: Path, precision: str) -> None:
    made = settings(options(engine="deepspeed", deepspeed_config=path, precision=precision, accumulate=3), world=2)
    zero, stage = made["zero_optimization"], int(path.stem[4])
    offloaded = path.stem.endswith("_offload")
    assert zero["stage"] == (2 if offloaded and stage == 1 and precision == "bf16" else stage)
    assert ("offload_optimizer" in zero) == offloaded
    assert ("offload_param" in zero) == (offloaded and stage == 3)
    assert made["bf16"]["enabled"] == (precision == "bf16")
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_clipping"] == 0.05


def test_every_combination_is_shipped() -> None:
    assert [path.stem for path in SHIPPED] == ["zero1", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload"]


def test_what_no_option_decides_is_taken_over(tmp_path: Path) -> None:
    made = of(tmp_path, {"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": True}, "wall_clock_breakdown": True})
    assert made["zero_optimization"] == {"overlap_comm": True, "reduce_bucket_size": 1000, "stage": 2}
    assert made["wall_clock_breakdown"] is True


def test_counts_that_agree_are_accepted_and_left_to_the_loop(tmp_path: Path) -> None:
    made = of(tmp_path, {"train_batch_size": 16, "gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 2})
    assert {"train_batch_size", "gradient_accumulation_steps"}.isdisjoint(made)


@pytest.mark.parametrize(
    ("content", "changed", "message"),
    [
        ({"train_batch_size": 8}, {}, "says train_batch_size = 8, the options 16"),
        ({"gradient_accumulation_steps": 1}, {}, "says gradient_accumulation_steps = 1, the options 4"),
        ({"gradient_clipping": 1.0}, {}, "says gradient_clipping = 1.0, the options 0.05"),
        ({"bf16": {"enabled": True}}, {}, "says bf16.enabled = True, the options False"),
        ({"zero_optimization": {"stage": 3}}, {"zero_stage": 1}, "says zero_optimization.stage = 3, the options 1"),
        ({"zero_optimization": {"stage": 2}}, {"offload": "all"}, "offload: all needs ZeRO stage 3, not 2"),
        (
            {"optimizer": {"type": "AdamW"}},
            {},
            "the section optimizer of .* would not be used; remove it, use the options of the optimizer",
        ),
        ({"fp16": {"enabled": True}}, {}, "the section fp16 of .* would not be used"),
        ({"zero_optimization": 2}, {}, "holds no settings of DeepSpeed"),
        ({}, {"engine": "sharded"}, "belongs to the deepspeed engine, not to sharded"),
        ({"zero_optimization": {"stage": 2}}, {"zero_stage": 0}, "says zero_optimization.stage = 2, the options 0"),
    ],
)
def test_contradictions_are_refused_with_both_values(
    content: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        of(tmp_path, content, **changed)


def test_a_file_of_stage_0_leaves_the_engine_replicated_and_must_hold(tmp_path: Path) -> None:
    path = tmp_path / "stage0.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}, "train_micro_batch_size_per_gpu": 2}))
    assert tiny(engine="auto", zero_stage=0, deepspeed_config=path, micro_batch_size=2).kind == "replicated"
    with pytest.raises(ConfigError, match="says train_micro_batch_size_per_gpu = 2, the options 1"):
        tiny(engine="auto", zero_stage=0, deepspeed_config=path, micro_batch_size=1)


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed_config: .* cannot be read"):
        settings(options(engine="deepspeed", deepspeed_config=tmp_path / "none.json"), world=1)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"deepspeed_config: .* is not JSON"):
        settings(options(engine="deepspeed", deepspeed_config=tmp_path / "bad.json"), world=1)


def _by_file_and_by_options(path: Path) -> None:
    by_file = tiny(engine="auto", deepspeed_config=path)
    assert by_file.kind == "deepspeed"
    stage = int(path.stem[4])
    by_options = tiny(engine="deepspeed", zero_stage=stage, offload="all" if stage == 3 else "optimizer")
    assert run(by_file) == run(by_options)
    assert equal(weights(by_file), weights(by_options))


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem in ("zero2_offload", "zero3_offload")], ids=lambda path: path.stem)
def test_a_file_selects_deepspeed_and_trains_like_the_options_it_stands_for(path: Path) -> None:
    spawn(_by_file_and_by_options, path)
