"""Language models that read long contexts through compressed memory, and the `beacon` command.

Names are loaded when first used, so importing the package (and the command's --help) stays free of torch.
"""

from __future__ import annotations

from beacon import auto
from lm_core.lazy import public_names

__all__, __getattr__, __dir__ = public_names(
    __name__,
    {
        "BeaconCache": "cache",
        "BeaconConfig": "config",
        "Plan": "plan",
        "attach_beacon": "attach",
        "build_plan": "plan",
    },
)

# from here on transformers' Auto classes know beacon models, whenever transformers is imported
auto.announce()
