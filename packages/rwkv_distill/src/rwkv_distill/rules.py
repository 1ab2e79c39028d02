"""Which parameters are trained, and how."""

from __future__ import annotations

from lm_core.method import Rule


def mixer_rules() -> list[Rule]:
    """Mixers: projections as configured, the decay at twice the rate, everything but projections without weight decay."""
    return [
        Rule(r"time_mixer\.w0$", lr_scale=2.0, weight_decay=0.0),
        Rule(r"time_mixer\.(receptance|key|value|gate|output)\.weight$"),
        Rule(r"time_mixer\.", weight_decay=0.0),
    ]


def student_rules(*, full: bool, mlp: bool) -> list[Rule]:
    """Beside mixers, kept attention and the norms of layers: MLPs if `mlp`, embedding, final norm and head if `full`."""
    adapters = [Rule(r"\.mlp\..*\.lora_", weight_decay=0.0), Rule(r"\.mlp\..*\.base_layer\.", trained=False)]
    rest = [] if full else [Rule(r"(embed_tokens|lm_head|model\.norm)\.", trained=False)]
    return [*mixer_rules(), *adapters, *([] if mlp else [Rule(r"\.mlp\.", trained=False)]), *rest]
