"""The recurrences by the Triton kernels of flash-linear-attention, for --wkv fla. Same arguments and results as `ops.wkv7` and `ops.wkv6`.

Those kernels compute in half precision; other inputs (a model that is read back and compared) go to ours.
B batch, T time, H heads, N head size, Q packed sequences.
"""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rwkv_distill import ops
from rwkv_distill.mixers import Rwkv7Mixer

if TYPE_CHECKING:
    from rwkv_distill.student import StudentModel

HALF = torch.bfloat16, torch.float16


def use_fla(student: StudentModel) -> None:
    """Let the mixers of this student recur by those kernels; single tokens of decoding stay with ours."""
    for mixer in student.mixers().values():
        mixer.operator = wkv7 if isinstance(mixer, Rwkv7Mixer) else wkv6


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, initial_state: Tensor | None = None, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `kernels_cuda.rwkv_distill.wkv7`."""
    if r.dtype not in HALF:
        return ops.wkv7(
            r, w, k, v, a, b, initial_state=initial_state, mask=mask, cu_seqlens=cu_seqlens, output_final_state=output_final_state
        )
    log_decay = -math.exp(-0.5) * torch.sigmoid(w.float())
    inputs = {"r": r, "w": log_decay, "k": k, "v": v, "a": a, "b": b}
    return _call("fla.ops.rwkv7", "chunk_rwkv7", inputs, initial_state, mask, cu_seqlens, output_final_state)


def wkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, *, initial_state: Tensor | None = None, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `kernels_cuda.rwkv_distill.wkv6`."""
    if r.dtype not in HALF:
        return ops.wkv6(r, k, v, w, u, initial_state=initial_state, mask=mask, cu_seqlens=cu_seqlens, output_final_state=output_final_state)
    inputs = {"r": r, "k": k, "v": v, "w": -w.float().exp()}
    return _call("fla.ops.rwkv6", "chunk_rwkv6", inputs, initial_state, mask, cu_seqlens, output_final_state, u=u)


def _call(
    module: str, name: str, inputs: dict[str, Tensor], state: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, keep: bool,
    **constants: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    hidden = None if mask is None else mask[:, :, None, None] == 0
    if hidden is not None:
        # these kernels know no mask: a token with a decay of one (logarithm 0) and without key, value and removal leaves the state as it is
        inputs = {key: value.masked_fill(hidden, 0.0) for key, value in inputs.items()}
    chunked: Any = getattr(importlib.import_module(module), name)
    y, final = chunked(
        **inputs,
        **constants,
        scale=1.0,
        # rows for keys there, for values here
        initial_state=None if state is None else state.transpose(-1, -2).contiguous(),
        output_final_state=keep,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long(),
    )
    y = y.to(inputs["r"].dtype)
    return y if hidden is None else y.masked_fill(hidden, 0.0), final.transpose(-1, -2) if keep else None
