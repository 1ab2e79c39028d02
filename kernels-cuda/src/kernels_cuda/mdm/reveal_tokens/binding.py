"""The op for torch: its schema."""

from __future__ import annotations

import torch

OP = "mdm/reveal_tokens"
OUTPUTS = (torch.int64, torch.float32, torch.float32)

# emulated: the same function from the CUDA sources run on the CPU
for _library in ("mdm", "mdm_emulated"):
    torch.library.define(
        f"{_library}::reveal",
        "(Tensor logits, Tensor slot, Tensor pos, Tensor(a!) token, Tensor(b!) logprob, Tensor(c!) confidence, "
        "int valid_vocab, float temperature, int top_k, float top_p, int key, int stream) -> ()",
    )
