"""Dense LLaMA models into mixtures of experts, their continued pre-training, and the `moe-cpt` command.

Names are loaded when first used, so importing the package (and the command's --help) stays free of torch.
"""

from __future__ import annotations

from lm_core.lazy import public_names

__all__, __getattr__, __dir__ = public_names(
    __name__,
    {
        "LlamaMoEConfig": "hf.configuration_llama_moe",
        "LlamaMoEForCausalLM": "model",
        "MoEBlock": "model",
        "Split": "split",
        "WeightedSources": "data",
        "check_slurm": "slurm",
        "convert": "convert",
        "moe_ffn": "experts",
        "plan": "plan",
        "split_ffn": "split",
        "update_weights": "weights",
    },
)
