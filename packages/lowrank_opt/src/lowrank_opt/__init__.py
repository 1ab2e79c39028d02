"""Training in little memory by low rank: optimizers, memory estimates and the `lowrank-opt` command.

Names are loaded when first used, so importing the package (and the command's --help) stays free of torch.
"""

from __future__ import annotations

from lm_core.lazy import public_names

__all__, __getattr__, __dir__ = public_names(
    __name__,
    {
        "AdamW": "adamw",
        "AdamW8bit": "adamw",
        "ApolloAdamW": "apollo",
        "FiraAdamW": "fira",
        "GaLoreAdamW": "galore",
        "GaLoreAdamW8bit": "galore",
        "LDAdamW": "ldadam",
        "MuonWithAdamW": "muon",
        "QGaLoreAdamW8bit": "qgalore",
        "UnsupportedDistributedError": "base",
        "attach_per_layer": "layerwise",
        "build_param_groups": "groups",
        "estimate_memory": "memory",
    },
)
