"""The optimizers by name, what they have in common, and the options of each: the sections of a YAML file. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from lm_core.config import config, opt

if TYPE_CHECKING:
    from lowrank_opt.config import TrainConfig

OPTIMIZERS = Literal[
    "lora",
    "galore",
    "galore8bit",
    "lora+galore",
    "lora+galore8bit",
    "baseline",
    "adamw8bit",
    "apollo",
    "apollo-mini",
    "fira",
    "qgalore",
    "ldadam",
    "muon",
]
PROJECTED = ("galore", "galore8bit", "lora+galore", "lora+galore8bit", "fira", "qgalore")
# those whose update needs no more of a gradient than L, which --engine lowrank exchanges
REDUCED = tuple(name for name in PROJECTED if name != "fira")
EIGHT_BIT = ("galore8bit", "lora+galore8bit", "adamw8bit", "qgalore")
LOW_RANK = (*PROJECTED, "apollo", "apollo-mini", "ldadam", "muon")
# those whose update can do with some rows of each matrix, which --engine sharded leaves to a process
BY_ROWS = (*PROJECTED, "apollo", "apollo-mini")
# rates to try when training from random weights, smallest first; tests show that the best of three learns as AdamW does
LEARNING_RATES = {name: (1e-3, 3e-3, 1e-2) if name in ("baseline", "adamw8bit") else (3e-3, 1e-2, 3e-2) for name in get_args(OPTIMIZERS)}
# of section galore, what LDAdam uses as well
OF_LDADAM = ("rank", "proj_type", "full_rank_policy", "proj_dtype")


@config
class GaloreOptions:
    """Section `galore`: the content of galore_config.json; each key is a flag, too."""

    rank: float = opt(128, "Rank of the projection; below 1 a fraction of the smaller side.", gt=0)
    update_proj_gap: int = opt(200, "Steps between two projections of a parameter.", ge=1)
    scale: float = opt(0.25, "Factor of the projected update.", gt=0)
    proj_type: Literal["std", "reverse_std", "right", "left", "full"] = opt("std", "Which side is projected.")
    target_modules: list[str] = opt(
        help="Regular expressions on parameter names to project; auto takes every linear layer except embeddings and heads.",
        factory=lambda: ["auto"],
    )
    exclude_modules: list[str] = opt(help="Regular expressions on parameter names to leave out.", factory=list)
    proj_method: Literal["auto", "svd", "gram", "rsvd", "subspace", "random"] = opt("auto", "How a basis is computed.")
    oversample: int = opt(16, "Columns beyond the rank in rsvd and subspace.", ge=0)
    power_iters: int = opt(2, "Power iterations of rsvd.", ge=0)
    moment_transfer: Literal["none", "project", "reset"] = opt("none", "What happens to the moments when a basis changes.")
    stagger: bool = opt(True, "Spread the refreshes of different parameters over the gap.")
    adaptive: bool | None = opt(None, "Double the gap of parameters whose basis hardly moves; default: true for qgalore, else false.")
    adaptive_threshold: float = opt(0.4, "Mean overlap of successive bases that doubles the gap.", gt=0, le=1)
    adaptive_window: int = opt(5, "Overlaps that the mean is taken over.", ge=1)
    max_gap: int | None = opt(None, "Longest gap of the adaptive rule in steps; default: 16 times the gap.", ge=1)
    full_rank_policy: Literal["identity", "rotate", "error"] = opt(
        "identity", "What happens to parameters whose smaller side is at most the rank."
    )
    proj_dtype: Literal["param", "fp32", "bf16", "int4"] | None = opt(
        None,
        "Type that bases are kept in, param being that of the weight; products with one in bf16 are taken in bf16. "
        "Default: int4 for qgalore, else param.",
    )
    weight_dtype: Literal["param", "int8"] = opt(
        "param",
        "Type that qgalore keeps the weights of matrices in: int8 is a code per entry, and a step and an offset for every 256.",
    )
    state_bits: Literal[8, 32] | None = opt(None, "Bits of the moments; default: 8 for the optimizers that are called so, else 32.")
    block_size: int = opt(256, "Values that share one scale in 8-bit state.", ge=1)
    min_8bit_size: int = opt(4096, "State tensors with fewer values stay float32.", ge=0)
    embedding_state_bits: Literal[8, 32] = opt(32, "Bits of the embeddings' state under an 8-bit optimizer.")
    compat: Literal["none", "galore_torch"] = opt("none", "Reproduce the arithmetic of another implementation, for comparison.")


@config
class ApolloOptions:
    """Section `apollo`: the object `apollo` of galore_config.json, where its keys have no prefix."""

    apollo_rank: int | None = opt(None, "Rank of APOLLO's random space; default: 256, 1 for apollo-mini.", ge=1)
    apollo_scale: float | None = opt(None, "Its root multiplies the update; default: 1, 128 for apollo-mini.", gt=0)
    apollo_scale_type: Literal["channel", "tensor"] | None = opt(
        None, "One factor per channel or per matrix; default: channel, tensor for apollo-mini."
    )
    apollo_update_proj_gap: int = opt(200, "Steps between two random spaces.", ge=1)
    apollo_norm_growth: float = opt(1.01, "Largest growth of an update's norm from step to step; Fira's, too.", gt=0)
    apollo_scale_front: bool = opt(False, "Scale before the limiter instead of after it.")
    apollo_proj_method: Literal["random", "svd"] = opt("random", "How the space is chosen.")


@config
class LdadamOptions:
    """Section `ldadam`: the object `ldadam` of galore_config.json, where its keys have no prefix."""

    ldadam_betas: tuple[float, float] = opt((0.908, 0.99), "Decay rates of the projected moments; other parameters have --betas.")
    ldadam_rho: float = opt(0.908, "Share of the momentum, beside the gradient, in what the basis follows.", ge=0, lt=1)
    ldadam_error_feedback: bool = opt(True, "Add what a step left out to the next gradient; takes a float32 copy of the gradient.")


@config
class LoraOptions:
    """Section `lora`: the content of lora_config.json."""

    r: int = opt(8, "Rank of the adapters.", ge=1)
    lora_alpha: float = opt(8, "Adapters are scaled by lora_alpha / r.", gt=0)
    lora_dropout: float = opt(0.1, "Dropout in front of the adapters.", ge=0, lt=1)
    target_modules_pretraining: list[str] = opt(
        help="Linear layers that get adapters in pretraining.", factory=lambda: ["q_proj", "v_proj"]
    )
    target_modules_finetuning: list[str] = opt(help="Linear layers that get adapters in finetuning.", factory=lambda: ["query", "value"])
    target_modules_by_model: dict[str, list[str]] = opt(
        help="Linear layers by model name or model type; wins over the two above.",
        factory=lambda: {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]},
    )
    use_rslora: bool = opt(False, "Scale by lora_alpha / sqrt(r).")
    use_dora: bool = opt(False, "Train the magnitude of weights separately (DoRA).")
    bias: Literal["none", "all", "lora_only"] = opt("none", "Biases trained beside the adapters.")
    init_lora_weights: str = opt(
        "true",
        "Initial adapters: true, gaussian, orthogonal; exported merged: pissa, pissa_niter_N, olora (out of the weights), lora_ga (by their gradient).",
    )
    lora_ga_batches: int = opt(64, "Micro-batches that lora_ga takes the gradient from.", ge=1)
    relora_every: int = opt(0, "Updates after which adapters are merged into the weights and begin again (ReLoRA); 0 is never.", ge=0)
    relora_warmup: int = opt(50, "Updates over which the learning rate rises after each of these restarts.", ge=1)
    train_base_modules: Literal["auto", "none"] = opt(
        "auto", "Train embeddings, norms and head beside the adapters: auto does in pretraining."
    )


def moment_bits(config: TrainConfig) -> int:
    """Bits of the moments, those of embeddings and small tensors aside."""
    return config.galore.state_bits or (8 if config.optimizer in EIGHT_BIT else 32)
