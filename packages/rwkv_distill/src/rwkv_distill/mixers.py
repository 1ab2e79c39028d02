"""Time mixers under the name that the package promises; their source travels with exported models (`hf`)."""

from rwkv_distill.hf.mixers_rwkv_distill import Rwkv6Mixer, Rwkv7Mixer

__all__ = ["Rwkv6Mixer", "Rwkv7Mixer"]
