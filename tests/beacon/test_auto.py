from __future__ import annotations

import subprocess
import sys

import pytest

FIRST = [
    "import beacon; from transformers import AutoConfig",
    "import beacon; from transformers import AutoModelForCausalLM, AutoConfig",
    "import beacon; from transformers import LlamaConfig, AutoConfig",
    "import beacon; from transformers import LlamaForCausalLM, AutoConfig",
    "import beacon; from transformers.models.llama.modeling_llama import LlamaModel; from transformers import AutoConfig",
    "from transformers import AutoConfig, AutoModelForCausalLM; import beacon",
    "from beacon.attach import attach_beacon; from transformers import AutoConfig",
    "from beacon.cache import BeaconCache; from transformers import AutoConfig",
]


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_auto_classes_know_beacon_models_in_any_order_of_imports(first: str) -> None:
    code = (
        f"{first}\n"
        "config = AutoConfig.for_model('beacon_llama', num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, "
        "vocab_size=9, beacon={'window': 4, 'stride': 4, 'ratio': [2]})\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_config(config)).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("BeaconLlamaForCausalLM\n", "")
