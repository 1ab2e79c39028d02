"""Beacons on a stock model, and their classes in transformers' Auto factories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from beacon.config import BeaconConfig
from beacon.modeling.causal_lm import BeaconMixin
from lm_core.errors import ConfigError

if TYPE_CHECKING:
    from beacon.modeling.families import Family


def attach_beacon(model: Any, config: BeaconConfig) -> Any:
    """`model` itself, now reading through beacons: the same weights under the same names, frozen, and new beacon weights.

    The beacon projections start as copies of the base's, the beacon embedding as that of the eos or bos token.
    Raises ConfigError for an architecture that is not supported.
    """
    from beacon.modeling.families import FAMILIES

    if isinstance(model, BeaconMixin):
        raise ConfigError("model: has beacons already; change its settings with `set_beacon`, or start from the stock model")
    kind = model.config.model_type
    family = FAMILIES.get(kind)
    if family is None or type(model) is not family.stock:
        raise ConfigError(f"model: the architecture {kind} ({type(model).__name__}) cannot carry beacons; supported: {', '.join(FAMILIES)}")
    if len(set(getattr(model.config, "layer_types", None) or ["full"])) > 1:
        raise ConfigError("model: some layers look back over a sliding window and some do not; beacons need the same for all")
    turned, size = 2 * len(model.model.rotary_emb.inv_freq), model.model.layers[0].self_attn.head_dim
    if turned != size:
        raise ConfigError(
            f"model: its rotary embedding turns {turned} of {size} dimensions of a head; beacons need one that turns all, so use another model"
        )
    model.requires_grad_(False)
    model.config.__class__ = family.config
    model.config.beacon = config.to_dict()
    model.__class__ = family.model
    install(model, family, copy=True)
    return model


def install(model: Any, family: Family, copy: bool) -> None:
    """Beacon layers and weights inside a model of a beacon class."""
    for layer in model.model.layers:
        layer.__class__ = family.layer
    model.add_beacons(copy)
    model.attn_backend = model.beacon.attn_backend
    trained = {id(parameter) for parameter in model.trainable_parameters()}
    for name, parameter in model.named_parameters():
        if "beacon_" in name:
            parameter.requires_grad_(id(parameter) in trained)


def set_beacon(model: Any, config: BeaconConfig) -> None:
    """Other settings for a model that has beacons. Raises ConfigError where they would need other weights."""
    if set(config.param) != set(model.beacon.param):
        raise ConfigError(f"param: {config.param}, but the model's beacons were made for {model.beacon.param}; start from the base model")
    model.config.beacon = config.to_dict()
    model.attn_backend = config.attn_backend
