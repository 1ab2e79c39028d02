"""The architectures that can carry beacons: a config, a decoder layer and a model class each, the stock one behind a mixin."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

from beacon.modeling.causal_lm import BeaconLayer, BeaconMixin
from beacon.modeling.configs import BeaconLlamaConfig


class BeaconLlamaDecoderLayer(BeaconLayer, LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    pass


class BeaconLlamaForCausalLM(BeaconMixin, LlamaForCausalLM):  # type: ignore[misc, no-untyped-call]
    config: BeaconLlamaConfig
    config_class = BeaconLlamaConfig
    _no_split_modules = ["BeaconLlamaDecoderLayer"]


@dataclass(frozen=True)
class Family:
    """Stock and beacon classes of one architecture."""

    stock: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    layer: type[nn.Module]
    model: type[PreTrainedModel]


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaForCausalLM, BeaconLlamaConfig, BeaconLlamaDecoderLayer, BeaconLlamaForCausalLM),
}
