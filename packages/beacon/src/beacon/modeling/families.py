"""The architectures that can carry beacons: a config, a decoder layer and a model class each, the stock one behind a mixin."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM

from beacon.modeling.causal_lm import BeaconLayer, BeaconMixin
from beacon.modeling.configs import BeaconLlamaConfig, BeaconMistralConfig, BeaconPhi3Config, BeaconQwen2Config, BeaconQwen3Config


class BeaconLlamaDecoderLayer(BeaconLayer, LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    pass


class BeaconLlamaForCausalLM(BeaconMixin, LlamaForCausalLM):  # type: ignore[misc, no-untyped-call]
    config: BeaconLlamaConfig
    config_class = BeaconLlamaConfig
    _no_split_modules = ["BeaconLlamaDecoderLayer"]


class BeaconMistralDecoderLayer(BeaconLayer, MistralDecoderLayer):  # type: ignore[no-untyped-call]
    pass


class BeaconMistralForCausalLM(BeaconMixin, MistralForCausalLM):  # type: ignore[misc, no-untyped-call]
    config: BeaconMistralConfig
    config_class = BeaconMistralConfig
    _no_split_modules = ["BeaconMistralDecoderLayer"]


class BeaconPhi3DecoderLayer(BeaconLayer, Phi3DecoderLayer):  # type: ignore[no-untyped-call]
    pass


class BeaconPhi3ForCausalLM(BeaconMixin, Phi3ForCausalLM):  # type: ignore[misc, no-untyped-call]
    config: BeaconPhi3Config
    config_class = BeaconPhi3Config
    _no_split_modules = ["BeaconPhi3DecoderLayer"]


class BeaconQwen2DecoderLayer(BeaconLayer, Qwen2DecoderLayer):  # type: ignore[no-untyped-call]
    pass


class BeaconQwen2ForCausalLM(BeaconMixin, Qwen2ForCausalLM):  # type: ignore[misc, no-untyped-call]
    config: BeaconQwen2Config
    config_class = BeaconQwen2Config
    _no_split_modules = ["BeaconQwen2DecoderLayer"]


class BeaconQwen3DecoderLayer(BeaconLayer, Qwen3DecoderLayer):  # type: ignore[no-untyped-call]
    pass


class BeaconQwen3ForCausalLM(BeaconMixin, Qwen3ForCausalLM):  # type: ignore[misc, no-untyped-call]
    config: BeaconQwen3Config
    config_class = BeaconQwen3Config
    _no_split_modules = ["BeaconQwen3DecoderLayer"]


@dataclass(frozen=True)
class Family:
    """Stock and beacon classes of one architecture."""

    stock: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    layer: type[nn.Module]
    model: type[PreTrainedModel]


FAMILIES: dict[str, Family] = {
    "llama": Family(LlamaForCausalLM, BeaconLlamaConfig, BeaconLlamaDecoderLayer, BeaconLlamaForCausalLM),
    "mistral": Family(MistralForCausalLM, BeaconMistralConfig, BeaconMistralDecoderLayer, BeaconMistralForCausalLM),
    "phi3": Family(Phi3ForCausalLM, BeaconPhi3Config, BeaconPhi3DecoderLayer, BeaconPhi3ForCausalLM),
    "qwen2": Family(Qwen2ForCausalLM, BeaconQwen2Config, BeaconQwen2DecoderLayer, BeaconQwen2ForCausalLM),
    "qwen3": Family(Qwen3ForCausalLM, BeaconQwen3Config, BeaconQwen3DecoderLayer, BeaconQwen3ForCausalLM),
}
