from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lm_core.config import build, leaves
from lm_core.deepspeed_settings import settings
from lm_core.errors import ConfigError
from lm_core.progress import Progress, Size
from mdm_scaling.commands import ds_config
from mdm_scaling.config import DeepSpeedConfig, PretrainConfig, settled
from mdm_scaling.options import EvalConfig, TasksConfig

BASE: dict[str, Any] = {"objective": "mdm", "model": "117M", "data": ["x"]}


def made(given: dict[str, Any] | None = None, **options: Any) -> PretrainConfig:
    return build(PretrainConfig, {**BASE, **options}, given=[given or {}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "budget: none given; use exactly one of"),
        ({"train_samples": 10, "flops": 1e18}, "train_samples and flops given"),
        ({"epochs": 2}, "epochs: counts passes over --unique-tokens"),
        ({"train_samples": 100}, "budget: 100 samples are less than one update of 256"),
        ({"budget": "1 steps", "model": "smollm2-135m", "num_layers": 3}, "num_layers: smollm2-135m brings its own sizes"),
        ({"budget": "1 steps", "model": "", "num_layers": 3}, "model: no network"),
        ({"budget": "1 steps", "min_lr": 1.0}, "min_lr: 1 is above the peak"),
        ({"budget": "1 steps", "max_position_embeddings": 64}, "max_length: 2048 is beyond the 64 positions"),
        ({"budget": "1 steps", "objective": "ar", "mask_eps": 0.01}, "mask_eps: only --objective mdm masks tokens"),
        ({"budget": "1 steps", "mask_mode": "fixed-count", "t_sampling": "shift"}, "t_sampling: shift"),
        ({"budget": "1 steps", "mask_eps": 1.0}, "mask_eps"),
        ({"budget": "1 steps", "variable_length_ratio": 1.5}, "variable_length_ratio"),
        ({"budget": "1 steps", "split": "1,2"}, "split: '1,2' is not three shares"),
        ({"budget": "1 steps", "num_mc": 0}, "num_mc"),
        ({"budget": "1 steps", "train_data_path_file": "paths.txt"}, "train_data_path_file: --data is given, too"),
        ({"train_samples": 1024, "lr_decay_samples": 50, "warmup": 100}, "lr_decay_samples: 50 is not beyond the warm-up"),
        ({"budget": "1 steps", "precision": "fp31"}, "precision"),
        ({"budget": "1 steps", "bf16": True, "fp16": True}, "precision: bf16 and fp16 given"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({"train_samples": 1000}, 1000),
        ({"train_tokens": "2.1M"}, 1025),
        ({"flops": 1e19, "objective": "ar", "model": "217M"}, 3_741_565),
        ({"flops": 1e19}, 6_584_834),
        ({"unique_tokens": "1M", "epochs": 4}, 1953),
    ],
)
def test_length_of_a_run(options: dict[str, Any], samples: int) -> None:
    config = made(**options)
    assert config.samples == samples
    assert dict(config.limits().limits) == {"samples": samples // 256 * 256}


# the values that section by section hold for a run that names its objective, its size, its data and its length alone
DEFAULTS: dict[str, Any] = {
    # the network
    "use_rotary_position_embeddings": True, "rotary_theta": 10000, "disable_bias_linear": True, "normalization": "rmsnorm", "norm_eps": 1e-5,
    "swiglu": True, "untie_embeddings": False, "init_std": 0.02, "attention_dropout": 0.1, "hidden_dropout": 0.1,
    "make_vocab_size_divisible_by": 128, "restrict_logits": True, "gradient_checkpointing": False, "recompute": None, "precision": "bf16",
    # batch and length
    "max_length": 2048, "micro_batch_size": 8, "global_batch_size": 256, "rampup_batch_size": None, "seed": 1234,
    # the optimizer
    "optimizer": "adam", "betas": (0.9, 0.95), "eps": 1e-8, "lr": 2e-4, "schedule": "cosine", "lr_decay_samples": None, "grad_clip": 1.0,
    "weight_decay": 0.1,
    # data
    "epoch_shuffle": "pooled", "packing": "stream", "eod_mask_loss": False, "reset_attention_mask": False, "reset_position_ids": False,
    "num_workers": 2,
    # diffusion
    "mask_eps": 1e-3, "t_sampling": "stratified", "mask_mode": "bernoulli", "loss_weight": "elbo", "max_loss_weight": None,
    "variable_length_ratio": 0.0, "low_noise_start": False, "low_noise_iter": 1000, "low_noise_ratio": 0.5,
    # experiments
    "ar_ratio": 0.0, "randmask_ratio": 0.0, "randmask_mode": "attention", "num_order_list": 0, "use_predefined_order": False,
    "order_target_position": "none",
    # output and control
    "log_every": 10, "save_every": "1000", "eval_every": "1000", "eval_iters": 100, "num_mc": 1, "eval_seed": 4321, "eval_window": "fixed",
    "keep_checkpoints": 2, "keep_best": True, "tensorboard": True, "wandb": "off", "nonfinite": "drop", "kill_file": None, "stop_every": None,
    "stop_minutes": None, "skip_train": False, "resume": "none", "overwrite": False,
    # engines
    "engine": "auto", "offload": "none", "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items(), ids=list(DEFAULTS))
def test_default(name: str, value: object) -> None:
    assert getattr(made(train_samples=100_000), name) == value


def test_what_follows_from_other_options() -> None:
    config = made(train_samples=100_000)
    shape = config.shape
    assert shape is not None
    assert (shape.key_value_heads, shape.ffn) == (shape.heads, int(4 * shape.hidden * 2 / 3 / 64) * 64)
    plain = made(train_samples=100_000, swiglu=False).shape
    assert plain is not None
    assert plain.ffn == 4 * shape.hidden
    # positions, the end of the warm-up and the end of the decay
    learned = made(train_samples=100_000, use_rotary_position_embeddings=False).shape
    assert learned is not None
    assert learned.positions == config.max_length
    for samples, warmup in ((100_096, 1001), (2560, 100), (256, 100), (150, 75)):
        short = made(train_samples=samples, global_batch_size=1)
        assert short.learning_rate(Progress(samples=warmup // 2 - 1), Size(samples=1), 1) == pytest.approx(2e-4 * (warmup // 2) / warmup)
        assert short.learning_rate(Progress(samples=samples - 1), Size(samples=1), 1) == pytest.approx(2e-5)
    assert EvalConfig(checkpoint="x", data=["y"]).num_mc == 32
    assert TasksConfig(checkpoint="x", tasks="y").num_mc == 32


def test_sizes_override_the_preset() -> None:
    config = made(budget="1 steps", num_layers=3, hidden_size=96)
    assert config.shape is not None
    assert (config.shape.layers, config.shape.hidden, config.shape.heads, config.shape.ffn) == (3, 96, 12, 256)
    own = made(budget="1 steps", model="", num_layers=2, hidden_size=64, num_attention_heads=4, kv_channels=16, num_key_value_heads=2)
    assert own.shape is not None
    assert own.shape.key_value_heads == 2


def rate(config: PretrainConfig, samples: int) -> float:
    """The rate of the step that ends at so many samples."""
    return config.learning_rate(Progress(samples=samples - 256), Size(samples=256), 1)


def test_schedule_is_the_closed_form() -> None:
    import math

    total, warmup, peak, low = 256 * 1000, 2560, 2e-4, 2e-5
    config = made(train_samples=total)
    assert rate(config, 256) == pytest.approx(peak * 256 / warmup)
    assert rate(config, warmup) == pytest.approx(peak)
    for x in (5120, 100 * 256, total // 256 * 256):
        r = (x - warmup) / (total - warmup)
        assert rate(config, x) == pytest.approx(low + (peak - low) / 2 * (1 + math.cos(math.pi * r)))
    linear = made(train_samples=total, schedule="linear")
    assert rate(linear, 100 * 256) == pytest.approx(peak - (peak - low) * (25600 - warmup) / (total - warmup))
    root = made(train_samples=total, schedule="inverse-sqrt")
    assert rate(root, 100 * 256) == pytest.approx(max(low, peak * math.sqrt(warmup / 25600)))
    decayed = made(train_samples=total, lr_decay_samples=total // 2, min_lr=1e-6)
    assert rate(decayed, total) == pytest.approx(1e-6)


def test_accumulation_follows_from_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled(made(budget="1 steps")).accumulate == 32
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert settled(made(budget="1 steps", micro_batch_size=2)).accumulate == 32
    with pytest.raises(ConfigError, match=r"global_batch_size: 256 is not a multiple of 24 .6 sequences on each of 4"):
        settled(made(budget="1 steps", micro_batch_size=6))
    assert settled(made({"accumulate": 2}, budget="1 steps")).global_batch_size == 64
    with pytest.raises(ConfigError, match="leave --accumulate out"):
        settled(made({"accumulate": 2}, budget="1 steps", global_batch_size=32))


def test_arithmetic_by_either_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert settled(made(budget="1 steps")).precision == "bf16"
    assert settled(made({"fp32": True}, budget="1 steps")).precision == "fp32"
    assert settled(made({"fp32": True, "precision": "fp32"}, budget="1 steps")).precision == "fp32"
    with pytest.raises(ConfigError, match="precision: fp16 and fp32 given"):
        made({"fp16": True, "precision": "fp32"}, budget="1 steps")


def test_deepspeed_settings_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    given = {**BASE, "train_samples": 1024, "zero_stage": 2, "micro_batch_size": 4, "out": tmp_path / "ds.json"}
    written = ds_config(build(DeepSpeedConfig, given))["settings"]
    assert (written["gradient_accumulation_steps"], written["train_batch_size"], written["zero_optimization"]["stage"]) == (16, 256, 2)
    again = settled(made(train_samples=1024, deepspeed_config=tmp_path / "ds.json", zero_stage=2, micro_batch_size=4))
    assert settings(again, 4)["zero_optimization"] == written["zero_optimization"]
    # a file that says otherwise is refused with both values
    other = settled(made(train_samples=1024, deepspeed_config=tmp_path / "ds.json", zero_stage=2, micro_batch_size=8))
    with pytest.raises(ConfigError, match=r"8.*4|4.*8"):
        settings(other, 4)
    with pytest.raises(ConfigError, match="reads no such file"):
        ds_config(build(DeepSpeedConfig, {**given, "zero_stage": None}))


def test_load_of_the_same_folder_means_go_on(tmp_path: Path) -> None:
    assert settled(made(budget="1 steps", output_dir=tmp_path, resume=str(tmp_path))).resume == "auto"
    assert settled(made(budget="1 steps", output_dir=tmp_path, resume=str(tmp_path / "other"))).resume != "auto"


def test_spellings_of_megatron_are_accepted() -> None:
    flags = {flag for leaf in leaves(PretrainConfig) for flag in (leaf.flag, *leaf.flags)}
    assert flags >= {
        "--preset", "--init-from", "--seq-length", "--global-batch-size", "--train-samples", "--lr-decay-style", "--lr-warmup-samples", "--lr-warmup-fraction",
        "--min-lr", "--clip-grad", "--adam-eps", "--save", "--load", "--save-interval", "--eval-interval", "--eval-iters", "--log-interval", "--data-path",
        "--train-data-path-file", "--valid-data-path-file", "--kill-switch-file", "--kv-channels", "--ffn-hidden-size", "--eod-mask-loss",
    }  # fmt: skip
    chosen = build(
        PretrainConfig,
        {"objective": "ar", "preset": "117M", "seq-length": 128, "lr-decay-style": "linear", "save": "x", "budget": "1 steps"},
    )
    assert (chosen.model, chosen.max_length, chosen.schedule, str(chosen.output_dir)) == ("117M", 128, "linear", "x")


def test_switches_of_the_original_guide_mean_options_of_core() -> None:
    given = {"deepspeed": True, "cpu_optimizer": "true", "adam_beta1": "0.8", "exit_interval": 5}
    options = made(given | PretrainConfig.further_layers(given)[0], budget="1 steps")
    assert (options.engine, options.offload, options.betas, options.stop_every) == ("deepspeed", "optimizer", (0.8, 0.95), 5)
    with pytest.raises(ConfigError, match="cpu_optimizer: True means offload optimizer, but offload is none"):
        made(cpu_optimizer=True, budget="1 steps")
