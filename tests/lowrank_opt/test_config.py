from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from lm_core.config import build, leaves, to_dict
from lm_core.errors import ConfigError
from lm_core.progress import Progress, Size
from lowrank_opt.checks import refuse_unused
from lowrank_opt.config import TrainConfig
from lowrank_opt.resolve import resolved, tell_packaged, with_data, without_foreign

# the original guide's options: flag, default, choices
GUIDE: list[tuple[str, Any]] = [
    ("--mode", None),
    ("--optimizer", None),
    ("--model", None),
    ("--batch_size", 16),
    ("--num_epochs", 30),
    ("--max_length", 512),
    ("--num_training_tokens", 10**9),
    ("--shuffle", True),
    ("--dtype", "fp16"),
    ("--lr", 4e-4),
    ("--weight_decay", 0.01),
    ("--tmax", 30),
    ("--lora_config", Path("config/lora_config.json")),
    ("--galore_config", Path("config/galore_config.json")),
    ("--test", False),
]


def make(**values: Any) -> TrainConfig:
    defaults = {"mode": "pretraining", "optimizer": "galore", "model": "llama_test", "data": ["synthetic:markov"]}
    return build(TrainConfig, {**defaults, **values})


@pytest.mark.parametrize(("flag", "default"), GUIDE, ids=[flag for flag, _ in GUIDE])
def test_every_flag_of_the_guide_exists_with_its_default(flag: str, default: Any) -> None:
    by_flag = {spelling.replace("_", "-"): leaf for leaf in leaves(TrainConfig) for spelling in (leaf.flag, *leaf.flags)}
    leaf = by_flag[flag.replace("_", "-")]
    if default is not None:
        assert leaf.default == default


def test_packaged_json_files_hold_the_defaults(tmp_path: Path) -> None:
    folder = files("lowrank_opt").joinpath("defaults")
    paths = {f"{name}_config": str(folder.joinpath(f"{name}_config.json")) for name in ("lora", "galore")}
    layers = TrainConfig.further_layers(paths)
    named = {leaf.path for leaf in leaves(TrainConfig) if "." in leaf.path}
    assert {f"{section}.{name}" for layer in layers for section, values in layer.items() for name in values} == named
    required = {"mode": "pretraining", "optimizer": "galore", "model": "llama_test", "data": ["synthetic:markov"]}
    assert to_dict(build(TrainConfig, required, *layers)) == to_dict(build(TrainConfig, required))


def test_a_json_file_wins_over_defaults_and_a_flag_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "galore.json"
    file.write_text('{"rank": 32, "scale": 0.5}')
    values = {"galore_config": str(file)}
    config = make(**values, galore={**TrainConfig.further_layers(values)[0]["galore"], "rank": 16})
    assert (config.galore.rank, config.galore.scale) == (16, 0.5)


def test_a_json_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"galore_config.*does not exist"):
        TrainConfig.further_layers({"galore_config": str(tmp_path / "none.json")})


def test_pretraining_counts_tokens_and_finetuning_epochs() -> None:
    assert dict(make(num_epochs=2, num_training_tokens="1M").limits().limits) == {"tokens": 2_000_000}
    assert dict(make(mode="finetuning", num_epochs=2).limits().limits) == {"epochs": 2}
    assert dict(make(max_steps=7).limits().limits) == {"steps": 7}
    assert dict(make(budget="3 hours").limits().limits) == {"hours": 3}


def test_the_default_schedule_is_half_a_cosine_over_tmax_epochs() -> None:
    config = make(mode="finetuning", lr=1.0, tmax=30)
    rates = [config.learning_rate(Progress(samples=100 * epoch), Size(), 100) for epoch in range(31)]
    assert rates[0] == 1.0
    assert rates[15] == pytest.approx(0.5)
    assert rates[30] == pytest.approx(0.0)
    assert rates == sorted(rates, reverse=True)


def test_the_rate_stays_at_the_floor_after_tmax_epochs_but_oscillates_in_steps() -> None:
    epochs = make(mode="finetuning", tmax=2, min_lr_ratio=0.1, lr=1.0)
    assert epochs.learning_rate(Progress(samples=300), Size(), 100) == pytest.approx(0.1)
    steps = make(tmax=2, tmax_unit="step", lr=1.0, max_steps=10)
    assert [round(steps.learning_rate(Progress(steps=s), Size(), 100), 6) for s in range(4)] == [0.5, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"budget": "3 steps", "max_steps": 3}, "max_steps"),
        ({"param_dtype": "bf16", "precision": "fp32"}, "param_dtype"),
        ({"mode": "finetuning", "model": "llama_60m"}, "model"),
        ({"galore": {"rank": 0}}, "galore.rank"),
        ({"galore": {"proj_type": "up"}}, "galore.proj_type"),
        ({"optimizer": "galor"}, "optimizer"),
        ({"budgett": "3 steps"}, "budgett"),
        ({"model": "smollm2-135m", "model_path": "x"}, "model_path: .*--model x"),
        ({"model_path": "x", "init": "random"}, "model_path: .*--init random"),
        ({"galore": {"rank": 4.5}}, "galore.rank: 4.5 is neither"),
        ({"budget": "1000 tokens"}, r"budget: 1,000 tokens are less than one update of 8,192 \(16 samples"),
        ({"num_training_tokens": 100, "num_epochs": 2}, "num_training_tokens: 200 tokens"),
        ({"total_batch_size": 24}, "total_batch_size: 24 is no multiple of 16.*use 32"),
        ({"total_batch_size": 32, "accumulate": 4}, "total_batch_size: 32 means --accumulate 2"),
        ({"schedule": "cosine_restarts"}, "restart_every"),
        ({"clip_mode": "delayed"}, "clip_mode: delayed clips nothing"),
        ({"clip_mode": "per_param", "grad_clip": 1}, "clip_mode: per_param belongs to per-layer"),
        ({"clip_mode": "global", "grad_clip": 1, "per_layer": True, "precision": "bf16"}, "clip_mode: per-layer"),
        ({"per_layer": True}, "per_layer: fp16"),
        ({"per_layer": True, "precision": "bf16", "engine": "sharded"}, "per_layer: engine: sharded keeps no whole gradient"),
        (
            {"optimizer": "galore", "engine": "deepspeed"},
            "optimizer: zero_stage: 2 flattens matrices, .*use --engine sharded, or --engine lowrank with --shard-optimizer true$",
        ),
        (
            {"optimizer": "muon", "engine": "deepspeed"},
            "optimizer: zero_stage: 2 flattens matrices, which muon .*use --engine replicated with --shard",
        ),
        ({"optimizer": "muon", "engine": "sharded"}, "optimizer: engine: sharded leaves .* some rows of a matrix, which muon needs whole"),
        ({"optimizer": "ldadam", "engine": "sharded"}, "optimizer: engine: sharded leaves .*, which ldadam needs whole"),
        ({"engine": "sharded", "galore": {"proj_type": "full"}}, "galore.proj_type: engine: sharded .*full needs whole ones; use right"),
        ({"engine": "sharded", "galore": {"compat": "galore_torch"}}, "galore.compat: galore_torch needs whole matrices"),
        ({"per_layer": True, "precision": "bf16", "num_processes": 2}, "per_layer: .*one process, not 2; use --engine lowrank"),
        (
            {"per_layer": True, "precision": "bf16", "num_processes": 2, "optimizer": "muon"},
            "per_layer: .*one process.*use --num-processes 1",
        ),
        ({"per_layer": True, "precision": "bf16", "nonfinite": "drop"}, "per_layer: .*dropped"),
        ({"per_layer": True, "precision": "bf16", "nonfinite": "skip"}, "per_layer: .*dropped"),
        ({"engine": "deepspeed", "optimizer": "adamw8bit"}, "optimizer: zero_stage: 2 would cut through the blocks"),
        ({"resume_reset_optimizer": True, "resume": "auto", "zero_stage": 2, "optimizer": "baseline"}, "resume_reset_optimizer: DeepSpeed"),
        ({"resume_reset_optimizer": True}, "resume_reset_optimizer: nothing is resumed"),
        ({"engine": "lowrank", "optimizer": "fira"}, "engine: lowrank sums projected gradients, and fira needs whole ones"),
        ({"engine": "lowrank", "optimizer": "muon"}, "engine: lowrank .*muon needs whole ones; use --engine replicated, or one of galore,"),
        ({"engine": "lowrank"}, "precision: fp16"),
        ({"engine": "lowrank", "precision": "bf16", "nonfinite": "drop"}, "nonfinite: drop"),
        ({"engine": "lowrank", "zero_stage": 2}, "zero_stage: 2 belongs to the deepspeed engine, not to lowrank"),
        ({"engine": "sharded", "optimizer": "baseline", "verify_replicas_every": 5}, "verify_replicas_every: engine: sharded keeps no"),
        ({"engine": "sharded", "optimizer": "baseline", "shard_optimizer": True}, "shard_optimizer: engine: sharded splits it already"),
        ({"model": "roberta"}, "model: roberta predicts no next token"),
        ({"optimizer": "lora", "lora": {"relora_warmup": 5}}, "lora.relora_warmup: 5 updates follow no restart"),
        ({"optimizer": "lora+galore", "lora": {"relora_every": 5}}, "lora.relora_every: restarts prune .*use --optimizer lora"),
        ({"optimizer": "lora", "lora": {"relora_every": 5, "use_dora": True}}, "lora.relora_every: DoRA's magnitudes"),
        ({"optimizer": "lora", "lora": {"relora_every": 5}, "engine": "sharded"}, "lora.relora_every: weights are whole .*engine: sharded"),
        ({"shuffle_buffer": 5}, "shuffle_buffer: 5 documents are shuffled under --streaming true"),
        ({"streaming": True, "packing": "stream"}, "packing: stream joins documents, and --streaming"),
        ({"streaming": True, "mode": "finetuning", "task": "sst2"}, "streaming: --task sst2 reads all"),
        (
            {"streaming": True, "mode": "finetuning", "data": ["a/b"], "model": "gpt2"},
            r"streaming: a/b has no known length.*write a/b\[100k\]",
        ),
        ({"optimizer": "lora", "lora": {"init_lora_weights": "pisa"}}, "lora.init_lora_weights: 'pisa' is unknown; use true, gaussian"),
        ({"optimizer": "lora", "lora": {"lora_ga_batches": 8}}, "lora.lora_ga_batches: true takes no gradient"),
    ],
)
def test_what_cannot_work_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make(**values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"mode": "finetuning", "num_training_tokens": "5M"}, "num_training_tokens"),
        ({"optimizer": "baseline", "galore": {"rank": 4}}, "galore.rank"),
        ({"optimizer": "apollo", "galore": {"rank": 4}}, "galore.rank"),
        ({"optimizer": "galore", "galore": {"block_size": 64}}, "galore.block_size"),
        ({"optimizer": "muon", "apollo": {"apollo_rank": 4}}, "apollo.apollo_rank"),
        ({"optimizer": "ldadam", "galore": {"scale": 0.5}}, "galore.scale: .*not to --optimizer ldadam"),
        ({"optimizer": "galore", "ldadam": {"ldadam_rho": 0.5}}, "ldadam.ldadam_rho"),
        ({"optimizer": "galore", "lora": {"r": 4}}, "lora.r"),
        ({"restart_every": 10}, "restart_every: .*cosine_restarts, not to cosine_tmax"),
        ({"cooldown": 0.1}, "cooldown: .*not to cosine_tmax"),
        ({"schedule": "linear", "tmax": 10}, "tmax: .*cosine_tmax, not to linear"),
        ({"schedule": "constant", "tmax_unit": "step"}, "tmax_unit"),
        ({"num_training_tokens": "5M", "budget": "10 steps"}, "num_training_tokens: .*--budget 10 steps"),
        ({"num_training_tokens": "5M", "max_steps": 10}, "num_training_tokens: .*--max-steps 10"),
        ({"mode": "finetuning", "num_epochs": 2, "budget": "10 steps"}, "num_epochs"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        refuse_unused(make(**values))


def test_a_default_that_the_command_line_repeats_is_chosen_and_a_smoke_test_replaces_any_length() -> None:
    layer = {"mode": "pretraining", "optimizer": "galore", "model": "llama_test", "data": ["synthetic:markov"], "budget": "10 steps"}
    refuse_unused(build(TrainConfig, layer))
    with pytest.raises(ConfigError, match="num_epochs"):
        refuse_unused(build(TrainConfig, layer, given=[{"num_epochs": 30}]))
    refuse_unused(build(TrainConfig, layer, given=[{"num_epochs": 30, "test": True}]))


def test_another_optimizer_on_the_command_line_leaves_out_what_a_file_says_for_its_own(caplog: pytest.LogCaptureFixture) -> None:
    preset = {"mode": "pretraining", "optimizer": "galore", "model": "llama_test", "data": ["synthetic:markov"]}
    preset |= {"galore": {"rank": 16, "scale": 0.5, "proj_type": "left"}}

    def chosen(**given: Any) -> TrainConfig:
        config = without_foreign(build(TrainConfig, preset, given=[given]))
        refuse_unused(config)
        return config

    assert chosen(optimizer="baseline").galore == make().galore
    assert "--optimizer baseline does not use galore.proj_type, galore.rank, galore.scale of the file" in caplog.text
    ldadam = chosen(optimizer="ldadam").galore
    assert (ldadam.rank, ldadam.proj_type, ldadam.scale) == (16, "left", 0.25)
    assert chosen(optimizer="fira").galore.scale == 0.5
    with pytest.raises(ConfigError, match=r"galore.scale: .*not to --optimizer muon"):
        chosen(optimizer="muon", **{"galore.scale": 0.3})
    with pytest.raises(ConfigError, match="belongs to galore"):
        refuse_unused(without_foreign(build(TrainConfig, {**preset, "optimizer": "baseline"})))


def test_a_total_batch_is_a_number_of_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved(make(total_batch_size=64)).accumulate == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolved(make(total_batch_size=64)).accumulate == 2


def test_pretraining_without_data_takes_enough_of_c4_for_an_epoch() -> None:
    assert with_data(make(data=[], num_training_tokens="1M")).data == ["allenai/c4:en[5000]"]
    assert with_data(make(data=["c4", "builtin:stdlib"], num_training_tokens="1M", max_length=64)).data[0] == "allenai/c4:en[31250]"
    assert with_data(make()).data == ["synthetic:markov"]
    with pytest.raises(ConfigError, match="nothing to train on"):
        with_data(make(mode="finetuning", data=[]))


def test_more_epochs_than_tmax_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    resolved(make(mode="finetuning", num_epochs=30))
    assert not caplog.records
    resolved(make(mode="finetuning", num_epochs=40, min_lr_ratio=0.1))
    assert "tmax: 40 epochs are longer than --tmax 30" in caplog.text


def test_state_bits_make_any_optimizer_an_8_bit_one_and_back() -> None:
    refuse_unused(make(optimizer="baseline", galore={"state_bits": 8, "block_size": 64}))
    with pytest.raises(ConfigError, match="block_size"):
        refuse_unused(make(optimizer="galore8bit", galore={"state_bits": 32, "block_size": 64}))


def test_restarts_repeat_half_a_cosine_and_warm_up_once() -> None:
    config = make(schedule="cosine_restarts", restart_every=4, lr=1.0, max_steps=8, min_lr_ratio=0.2, warmup=2)
    rates = [config.learning_rate(Progress(steps=step), Size(), 100) for step in range(8)]
    cycle = [0.2 + 0.4 * (1 + math.cos(math.pi * x / 4)) for x in (1, 2, 3, 4)]
    assert rates == pytest.approx([cycle[0] / 2, *cycle[1:], *cycle])


def test_the_run_folder_names_model_optimizer_and_mode() -> None:
    assert make().run_folder() == Path("models/llama_test_galore_pretrained")
    assert make(output_dir="x").run_folder() == Path("x")


def test_other_words_for_engines_and_packing() -> None:
    layers = TrainConfig.further_layers({"dist": "fsdp"})
    assert (
        build(TrainConfig, {"mode": "pretraining", "optimizer": "baseline", "model": "llama_test", "dist": "fsdp"}, *layers).engine
        == "sharded"
    )
    assert not [layer for layer in TrainConfig.further_layers({}) if "engine" in layer]
    with pytest.raises(ConfigError, match="dist: ddp means --engine replicated, not sharded"):
        make(dist="ddp", engine="sharded", optimizer="baseline")
    assert [resolved(make(packing=word)).packing for word in ("false", "true", "best-fit")] == ["document", "stream", "best-fit"]
    assert [resolved(make(nonfinite=word)).nonfinite for word in ("stop", "drop", "skip")] == ["stop", "drop", "drop"]


def test_a_configuration_goes_to_hub_data_without_one() -> None:
    assert with_data(make(data=["c4"], dataset_config="de", num_training_tokens=1000)).data == ["allenai/c4:de[5]"]
    mixed = make(data=["owner/texts[9]@2", "owner/other:fr", "builtin:stdlib"], dataset_config="en")
    assert with_data(mixed).data == ["owner/texts:en[9]@2", "owner/other:fr", "builtin:stdlib"]
    with pytest.raises(ConfigError, match="dataset_config: no --data is a hub data set without a configuration"):
        with_data(make(dataset_config="en"))
    with pytest.raises(ConfigError, match="dataset_config: --task sst2 says"):
        with_data(make(mode="finetuning", task="sst2", dataset_config="en"))


def test_lora_targets_may_be_a_list_a_regular_expression_or_an_object_by_model(tmp_path: Path) -> None:
    from lowrank_opt.method import adapter_config

    def targets(value: Any, **more: Any) -> Any:
        path = tmp_path / "lora.json"
        path.write_text(json.dumps({"target_modules_pretraining": value, "target_modules_by_model": {}, **more}))
        layers = TrainConfig.further_layers({"mode": "pretraining", "lora_config": str(path)})
        read = next(layer["lora"] for layer in layers if "lora" in layer)
        return adapter_config(make(optimizer="lora", lora=read), "llama")["target_modules"]

    with pytest.raises(ConfigError, match=r"lora_config: apollo in .*lora.json is no object"):
        targets("k_proj", apollo=3)
    with pytest.raises(ConfigError, match="target_modules_by_model"):
        targets({"llama": ["o_proj"]}, target_modules_by_model=3)
    assert targets(["k_proj"]) == ["k_proj"]
    assert targets("k_proj") == ["k_proj"]
    assert targets("all-linear") == "all-linear"
    assert targets(".*[qk]_proj") == ".*[qk]_proj"
    assert targets({"llama": ["o_proj"], "gpt2": ["c_attn"]}) == ["o_proj"]
    assert targets({"llama": ["o_proj"]}, target_modules_by_model={"llama": ["v_proj"]}) == ["v_proj"]
    # as peft writes it
    assert targets(["k_proj"], init_lora_weights=False) == ["k_proj"]


def test_a_json_file_that_is_absent_from_its_usual_place_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/galore_config.json").write_text("{}")
    with caplog.at_level("INFO", "lowrank_opt"):
        tell_packaged(make(optimizer="baseline"))
        assert not caplog.text
        tell_packaged(make(optimizer="lora+galore"))
    assert "lora_config: there is no config/lora_config.json; the packaged values hold" in caplog.text
    assert "galore_config" not in caplog.text
