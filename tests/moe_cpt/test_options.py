"""Names and defaults of the options in the tables of the specification, over the config classes alone."""

from __future__ import annotations

from typing import Any

import pytest

from lm_core.config import build, leaves
from moe_cpt import config as module
from moe_cpt.hf.configuration_llama_moe import LlamaMoEConfig
from moe_cpt.method import MoeCPT

# by class: the flag as the guide writes it, and its default; an option without one waits for the checkpoint, the launcher or the data
TABLES: dict[str, dict[str, Any]] = {
    "TrainConfig": {
        "mode": "fpt", "model_type": None, "from_dense": "none", "num_experts": 16, "torch_dtype": "auto", "num_selects": None,
        "moe_calculator_score_scale_factor": None, "gate_balance_loss_weight": None, "gate_type": None, "gate_network_type": "mlp",
        "calculator_type": None, "attn_implementation": "sdpa", "tokenizer_name_or_path": None,
        "validation_dir": [], "prob_map": None, "dynamic_data_selection": "none", "block_size": 2048, "max_train_samples": None,
        "data_cache_dir": None, "num_tokens": 10**11, "max_tokens": 10**11, "max_steps": None, "budget": "", "learning_rate": 2e-4,
        "final_lr_portion": 0.0, "lr_floor_style": "clipped", "warmup_steps": 100, "warmup_tokens": None,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": None, "gradient_accumulation_steps": 1, "weight_decay": 0.1,
        "betas": (0.9, 0.95), "adam_beta1": None, "adam_beta2": None, "max_grad_norm": 1.0, "seed": 1227, "eval_tokens": 0,
        "eval_steps": "0.1", "save_steps": "1000", "save_total_limit": 1, "save_optim_limit": 1, "logging_steps": 5, "logging_first_step": True,
        "balance_scope": "micro", "experts_backend": "auto", "k_schedule": None, "freeze_router": False,
        "on_exhausted": "repeat", "document_mask": False, "reference_loss": None, "dynamic_eta": 1.0, "dynamic_smoothing": 1e-4,
        "dynamic_min_weight": 0.0, "dynamic_max_weight": 1.0, "deepspeed": None, "gradient_checkpointing": False, "bf16": None,
        "precision": "bf16", "num_nodes": None, "num_gpu_per_node": None, "flops_per_device": 312e12, "report_to": [], "tensorboard": True,
        "output_dir": None, "overwrite_output_dir": False, "resume_from_checkpoint": "none", "allow_data_change": False, "comment": "", "require_checklist": False,
        "debug_mode": False, "lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.1, "trainable": "q_proj,v_proj", "modules_to_save": "",
        "peft_path": None,
    },
    "SFTConfig": {"freeze_gate": False, "model_max_length": 2048, "learning_rate": 2e-5, "num_train_epochs": 2, "warmup_ratio": 0.03},
    "ConvertConfig": {
        "num_selects": 4, "score_scale_factor": None, "score_scale_factor_file_path": None, "gate_network": "mlp", "gate_init": "normal",
        "select_file_path": None, "calibration_data": [], "calibration_tokens": 65536, "use_softmax": True, "multiply_gate_scores": True,
        "dtype": "source", "format": "llama_moe", "overwrite": False,
    },
    "SplitConfig": {"num_experts": 16, "seed": 1227},
    "ClusteringConfig": {"proj_type": "up_proj", "metric": "l2", "max_iter": 500, "n_init": 1},
    "GraphConfig": {"proj_type": "up_proj", "metric": "l1_norm", "threshold": 1.0},
    "GradientConfig": {"expert_size": None, "criterion": "max", "share_neurons": False, "proj_type": "up_proj"},
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
        "content_column": "content", "src_tokenizer": None, "num_proc": None, "use_fast": False, "append_eos": True, "on_bad_line": "error",
    },
    "PackConfig": {"dtype": "auto", "shard_tokens": 1_000_000_000},
    "ScaleConfig": {"mode": "ratio", "layerwise": False},
    "EvalConfig": {"block_size": 2048},
    "SlurmCheckConfig": {"max_cpus": 128, "header": None, "fix": False},
    "TensorBoardConfig": {"port": 8001, "run": False},
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_options_have_their_names_and_defaults(name: str) -> None:
    found: dict[str, Any] = {}
    for leaf in leaves(getattr(module, name)):
        for flag in (leaf.flag, *leaf.flags):
            found[flag.lstrip("-").replace("-", "_")] = leaf.default
    assert {option: found[option] for option in TABLES[name]} == TABLES[name]


def test_required_inputs_have_the_names_of_the_guide() -> None:
    made = build(module.TrainConfig, {"model_name_or_path": "x", "dataset_dir": "y,z"})
    assert (made.model, made.data) == ("x", ["y,z"])
    tuned = build(module.SFTConfig, {"model_name_or_path": "x", "dataset_dir_or_path": "y"})
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
    converted = MoeCPT(build(module.TrainConfig, words)).model_config()
    assert {name: getattr(converted, name) for name in expected} == expected
