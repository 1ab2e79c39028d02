"""Commands that make a mixture, and those that turn it into something else."""

from __future__ import annotations

import json
import shutil
from typing import Any

import click

from lm_core.cli import Command, configured
from moe_cpt.options.conversion import ConvertConfig, ExportConfig, LegacyConfig, ScaleConfig, TrainGateConfig
from moe_cpt.targets import require_free


@click.command("train-gate", cls=Command)
@configured(TrainGateConfig)
def train_gate(config: TrainGateConfig) -> dict[str, Any]:
    """Train routers to find the experts whose neurons are most active on a token.

    Example: moe-cpt train-gate --model_path smollm2-135m --split_file_path split.safetensors --hidden_features_path feats/ --save_path gate.safetensors
    """
    from moe_cpt.train_gate import train_gate as fit

    shares = fit(config)
    for layer, share in enumerate(shares):
        print(f"layer {layer}: {share:.1%} of the {config.num_selects} most active experts found on held-out tokens")
    return {"save_path": str(config.save_path), "overlap": shares}


@click.command(cls=Command)
@configured(ConvertConfig)
def convert(config: ConvertConfig) -> dict[str, Any]:
    """Write the mixture of experts of a dense model and a split.

    Example: moe-cpt convert --model_path smollm2-135m --split_file_path split.safetensors --num_selects 4 --save_path moe-4of16
    """
    import torch

    from lm_core.models import load_tokenizer
    from moe_cpt.calibrate import read_scales
    from moe_cpt.convert import convert as write
    from moe_cpt.export import export as write_stock
    from moe_cpt.models import source_folder
    from moe_cpt.plan import parameter_counts
    from moe_cpt.split import Split
    from moe_cpt.split.features import token_rows
    from moe_cpt.split.legacy import read_legacy
    from moe_cpt.tensors import ModelTensors, read_config

    source, path = source_folder(config.model_path), config.split_file_path
    if path.is_dir():
        stored = read_config(source)
        chosen = read_legacy(path, ModelTensors(source), stored["num_hidden_layers"], stored["intermediate_size"])
    else:
        chosen = Split.load(path)
    if config.format != "llama_moe":
        require_free("save_path", config.save_path, config.overwrite)
    file = config.score_scale_factor_file_path
    rows = []
    if config.gate_init == "ridge" and config.calibration_data:
        tokenizer, tokens = load_tokenizer(str(source)), int(config.calibration_tokens)
        rows = token_rows(config.calibration_data, tokenizer, text_column=config.text_column, length=512, tokens=tokens)
    # a mixture of another format is exported from one of ours
    own = config.save_path if config.format == "llama_moe" else config.save_path.with_name(config.save_path.name + ".llama_moe")
    made = write(
        source,
        chosen,
        own,
        num_selects=config.num_selects,
        score_scale_factor=config.score_scale_factor if file is None else read_scales(file, len(chosen.indices)),
        gate_network=config.gate_network,
        gate_init=config.gate_init,
        calibration=rows,
        trained_gate=config.select_file_path,
        add_noise=config.add_noise,
        gate_type=config.gate_type,
        calculator_type=config.calculator_type,
        add_weight_norm=config.add_weight_norm,
        moe_layers=config.chosen_layers(),
        use_softmax=config.use_softmax,
        multiply_gate_scores=config.multiply_gate_scores,
        dtype=None if config.dtype == "source" else getattr(torch, config.dtype),
        seed=config.seed,
        overwrite=config.overwrite or config.format != "llama_moe",
    )
    if config.format != "llama_moe":
        try:
            write_stock(ExportConfig(model=str(own), save_path=config.save_path, format=config.format, overwrite=config.overwrite))
        finally:
            shutil.rmtree(own)
    counts = parameter_counts(made.to_dict())
    print(f"{config.save_path}: {made.num_selects} of {made.num_experts} experts, scale factor {made.score_scale_factor}")
    print(f"parameters  dense {counts.dense:,}  total {counts.total:,}  active {counts.active:,}")
    return {"save_path": str(config.save_path), "dense": counts.dense, "total": counts.total, "active": counts.active}


@click.command("calibrate-scale", cls=Command)
@configured(ScaleConfig)
def calibrate_scale(config: ScaleConfig) -> dict[str, Any]:
    """Write score scale factors measured against the dense model.

    Example: moe-cpt calibrate-scale --model_path moe-4of16 --dense_path smollm2-135m --data builtin:python-docs --mode lsq -o scales.json
    """
    from moe_cpt.calibrate import calibrate

    require_free("save_path", config.save_path, config.overwrite)
    scales = calibrate(config)
    config.save_path.write_text(json.dumps(scales) + "\n")
    print(f"{config.save_path}: {config.mode} factors from {min(scales):.4g} to {max(scales):.4g}")
    return {"save_path": str(config.save_path), "scales": scales}


@click.command(cls=Command)
@configured(ExportConfig)
def export(config: ExportConfig) -> dict[str, Any]:
    """Write a mixture as a folder that stock transformers load, and compare its logits.

    Example: moe-cpt export --model moe-4of16 --format llama_moe --save_path exported/
    """
    from moe_cpt.export import export as write

    return write(config)


@click.command("import-legacy", cls=Command)
@configured(LegacyConfig)
def import_legacy(config: LegacyConfig) -> dict[str, Any]:
    """Write a checkpoint of the original LLaMA-MoE code as a mixture of this package.

    Example: moe-cpt import-legacy --model LLaMA-MoE-v1-3_5B-4_16 --save_path moe-4of16
    """
    from lm_core.models import model_folder
    from moe_cpt.legacy import import_legacy as write

    made = write(model_folder(config.model), config.save_path, overwrite=config.overwrite)
    print(f"{config.save_path}: {made.num_selects} of {made.num_experts} experts, scale factor {made.score_scale_factor}")
    return {"save_path": str(config.save_path), "num_experts": made.num_experts, "num_selects": made.num_selects}
