"""Names and defaults of the options in the tables of the specification, over the config classes alone."""

from __future__ import annotations

from typing import Any

import pytest

from lm_core.config import build, leaves
from moe_cpt import config
from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.method import MoeCPT
from moe_cpt.options import checks, conversion, corpus, splits

# by class: the flag as the guide writes it, and the default that the specification gives it
TABLES: dict[str, dict[str, Any]] = {
    "TrainConfig": {
        "mode": "fpt", "model_type": "llama_moe", "from_dense": "none", "num_experts": 16, "torch_dtype": "bfloat16", "num_selects": 4,
        "moe_calculator_score_scale_factor": 4.0, "gate_balance_loss_weight": 1e-2, "gate_type": "TopKBalancedNoisyGate",
        "gate_network_type": "mlp", "calculator_type": "UniversalCalculator", "attn_implementation": "sdpa", "tokenizer_name_or_path": None,
        "validation_dir": [], "prob_map": "llama", "dynamic_data_selection": "none", "block_size": 2048, "max_train_samples": None,
        "data_cache_dir": "resources/cache", "num_tokens": 10**11, "max_tokens": 10**11, "max_steps": None, "budget": "", "learning_rate": 2e-4,
        "final_lr_portion": 0.0, "lr_floor_style": "clipped", "warmup_steps": 100, "warmup_tokens": None,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1, "weight_decay": 0.1,
        "betas": (0.9, 0.95), "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0, "seed": 1227, "eval_tokens": 0,
        "eval_steps": "1.0", "save_steps": "1.0", "save_total_limit": 1, "save_optim_limit": 1, "logging_steps": 5, "logging_first_step": True,
        "balance_scope": "micro", "experts_backend": "auto", "k_schedule": None, "freeze_router": False,
        "on_exhausted": "repeat", "document_mask": False, "reference_loss": None, "dynamic_eta": 1.0, "dynamic_smoothing": 1e-4,
        "dynamic_min_weight": 0.0, "dynamic_max_weight": 1.0, "deepspeed": None, "gradient_checkpointing": False, "bf16": True,
        "precision": "bf16", "num_nodes": 1, "num_gpu_per_node": 1, "flops_per_device": 312e12, "report_to": ["tensorboard"], "tensorboard": True,
        "output_dir": "outputs/<job-name>-<job-id>", "overwrite_output_dir": False, "resume_from_checkpoint": "none", "allow_data_change": False, "comment": "", "require_checklist": False,
        "debug_mode": False, "lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.1, "trainable": "q_proj,v_proj", "modules_to_save": "",
        "peft_path": None,
    },
    "SFTConfig": {"freeze_gate": False, "model_max_length": 2048, "learning_rate": 2e-5, "num_train_epochs": 2, "warmup_ratio": 0.03},
    "ConvertConfig": {
        "num_selects": 4, "score_scale_factor": "<N/K>", "score_scale_factor_file_path": None, "gate_network": "mlp", "gate_init": "normal",
        "select_file_path": None, "calibration_data": [], "calibration_tokens": 65536, "use_softmax": True, "multiply_gate_scores": True,
        "dtype": "source", "format": "llama_moe", "overwrite": False,
    },
    "SplitConfig": {"num_experts": 16, "seed": 1227},
    "ClusteringConfig": {"proj_type": "up_proj", "metric": "l2", "max_iter": 500, "n_init": 1},
    "GraphConfig": {"proj_type": "up_proj", "metric": "l1_norm", "threshold": 1.0},
    "GradientConfig": {"expert_size": "<e_m>", "criterion": "max", "share_neurons": False, "proj_type": "up_proj"},
    "ResidualConfig": {"num_experts_residual": 2},
    "ActivationConfig": {"num_shared_experts": 0, "k_act": 10},
    "ClusterTextConfig": {"num_clusters": 16, "do_train": True, "do_eval": True, "encoder": "tfidf", "encoder_path": None},
    "ScoreConfig": {"kernel": "l1_norm", "accumulate_level": "sample", "importance_type": "feature_change", "block_size": 4096},
    "TrainGateConfig": {
        "gate_network": "mlp", "num_selects": 4, "select_criterion": "l2_norm", "epochs": 100, "lr": 0.1, "batch_size": 1024,
        "train_percent": 0.95,
    },
    "FeaturesConfig": {"block_size": 2048, "batch_size": 4, "max_tokens": 1_000_000, "what": ["act"], "reduce": "none"},
    "TokenizeConfig": {
        "content_column": "content", "src_tokenizer": None, "num_proc": "<cpus>", "use_fast": False, "append_eos": True, "on_bad_line": "error",
    },
    "PackConfig": {"dtype": "auto", "shard_tokens": 1_000_000_000},
    "ScaleConfig": {"mode": "ratio", "layerwise": False},
    "EvalConfig": {"block_size": 2048},
    "SlurmCheckConfig": {"max_cpus": 128, "header": None, "fix": False},
    "TensorBoardConfig": {"port": 8001, "run": False},
}  # fmt: skip

LATER = "the checkpoint's value holds, and this one where it has none"
WORD = "another word for an option that has this default"
# defaults of ours that read otherwise, each with its reason
OTHERWISE: dict[str, dict[str, tuple[Any, str]]] = {
    "TrainConfig": {
        "model_type": (None, "with --from-dense it is llama; a dense model without that is refused anyway"),
        "torch_dtype": ("auto", WORD), "bf16": (None, WORD), "adam_beta1": (None, WORD), "adam_beta2": (None, WORD), "report_to": ([], WORD),
        "num_selects": (None, LATER), "moe_calculator_score_scale_factor": (None, LATER), "gate_balance_loss_weight": (None, LATER),
        "gate_type": (None, LATER), "calculator_type": (None, LATER),
        "prob_map": (None, "llama for a folder of sources; a comma list brings its own weights"),
        "data_cache_dir": (None, "one cache for all runs and packages, not one in each folder that a command is called from"),
        "per_device_eval_batch_size": (None, "that of training: who lowers it for want of memory lowers both"),
        "eval_steps": ("0.1", "a long run that shows no held-out loss before its end helps nobody, and shares follow evaluations"),
        "save_steps": ("1000", "a run that saves nothing before its end is lost with its machine"),
        "num_nodes": (None, "the launcher's"), "num_gpu_per_node": (None, "the launcher's"),
        "output_dir": (None, "runs/<model>_moe_cpt, which --resume auto finds again; the Slurm scripts name outputs/<job-name>-<job-id>"),
    },
    "ConvertConfig": {"score_scale_factor": (None, "experts over selected experts, once both are known")},
    "GradientConfig": {"expert_size": (None, "an equal part, once the neurons are known")},
    "TokenizeConfig": {"num_proc": (None, "one per processor")},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_options_have_their_names_and_defaults(name: str) -> None:
    found: dict[str, Any] = {}
    (kind,) = {getattr(module, name) for module in (config, checks, conversion, corpus, splits) if hasattr(module, name)}
    for leaf in leaves(kind):
        for flag in (leaf.flag, *leaf.flags):
            found[flag.lstrip("-").replace("-", "_")] = leaf.default
    otherwise = {option: value for option, (value, _) in OTHERWISE.get(name, {}).items()}
    assert {option: found[option] for option in TABLES[name]} == TABLES[name] | otherwise
    assert all(TABLES[name][option] != value for option, value in otherwise.items())


def test_required_inputs_have_the_names_of_the_guide() -> None:
    made = build(config.TrainConfig, {"model_name_or_path": "x", "dataset_dir": "y,z"})
    assert (made.model, made.data) == ("x", ["y,z"])
    tuned = build(config.SFTConfig, {"model_name_or_path": "x", "dataset_dir_or_path": "y"})
    assert (tuned.model, tuned.data) == ("x", ["y"])


def test_a_mixture_of_which_nothing_is_said_has_the_published_routing() -> None:
    stored = LlamaMoEConfig(num_hidden_layers=1, intermediate_size=32)
    expected = {
        "num_experts": 16, "num_selects": 4, "num_shared_experts": 0, "shared_scale_factor": 1.0, "size_experts": None, "moe_layers": "all",
        "gate_type": "TopKBalancedNoisyGate", "gate_network": "mlp", "gate_use_softmax": True, "gate_use_balance": True,
        "gate_add_noise": True, "gate_balance_loss_weight": 1e-2, "gate_noise_epsilon": 1e-2, "calculator_type": "UniversalCalculator",
        "multiply_gate_scores": True, "score_scale_factor": 4.0, "drop_tokens": True, "dropped_padding": "zero", "capacity_factor": 1.25,
        "add_weight_norm": False, "balance_scope": "micro", "experts_backend": "auto",
    }  # fmt: skip
    assert {name: getattr(stored, name) for name in expected} == expected
    # what a run of a dense model falls back to
    words = {"model": "llama_test", "data": ["x"], "from_dense": "random"}
    converted = MoeCPT(build(config.TrainConfig, words)).model_config()
    assert {name: getattr(converted, name) for name in expected} == expected
