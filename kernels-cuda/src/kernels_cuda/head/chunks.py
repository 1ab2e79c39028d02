"""What losses of an output head share: checks of labels, and a weight's gradient that many chunks add to.

V vocabulary, D hidden width, R rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels_cuda import check, choice

# Size of a product on its way into the float32 sum. Small enough to stay in a CPU's last cache, large enough that threads
# seldom wait for one another: on a busy machine 2 MiB cost twice the time of 8.
SLICE_BYTES = {"cpu": 2**23, "cuda": 2**26}


def check_labels(labels_N: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Labels that count lie inside the vocabulary. Waits for a GPU, so callers ask only on a CPU."""
    outside_N = (labels_N != ignore_index) & ((labels_N < 0) | (labels_N >= vocabulary))
    if outside_N.any():
        row = int(outside_N.nonzero()[0])
        check.fail(
            "labels",
            f"{int(labels_N[row])} in row {row}",
            f"is outside the vocabulary of {vocabulary}",
            f"use 0 to {vocabulary - 1}, or {ignore_index} to ignore a row",
        )


class WeightGradient:
    """The sum of gradient_RV.T @ hidden_RD over chunks, in the dtype of the weight.

    Sums of many chunks need float32, and torch has no bfloat16 product that adds to it on a CPU: a bfloat16 gradient gets a second
    half for the lower bits of a float32 until the sum is complete. Its kernels belong to linear_cross_entropy.
    """

    def __init__(self, weight_VD: Tensor) -> None:
        self.sum_VD = torch.empty_like(weight_VD, memory_format=torch.contiguous_format)
        # rows that hold a sum already
        self.begun = 0
        self.lower_VD: Tensor | None = None
        if weight_VD.dtype == torch.bfloat16:
            self.sum_VD.zero_()
            self.lower_VD = weight_VD.new_zeros(weight_VD.shape, dtype=torch.int16)
            self.kernels = getattr(torch.ops, choice.library("head/linear_cross_entropy", weight_VD.device.type))

    def add(self, gradient_RV: Tensor, hidden_RD: Tensor) -> None:
        """One chunk; its columns are the first of the vocabulary."""
        vocabulary = gradient_RV.shape[1]
        if self.lower_VD is None:
            if self.begun:
                self.sum_VD[:vocabulary].addmm_(gradient_RV.t(), hidden_RD)
            else:
                # written, not added to zeros that would have to be written before
                torch.mm(gradient_RV.t(), hidden_RD, out=self.sum_VD[:vocabulary])
                self.begun = vocabulary
            return
        size = max(1, SLICE_BYTES[hidden_RD.device.type] // (2 * max(hidden_RD.shape[1], 1)))
        for start in range(0, vocabulary, size):
            columns = slice(start, min(start + size, vocabulary))
            part = torch.mm(gradient_RV[:, columns].t(), hidden_RD)
            self.kernels.add_split_(self.sum_VD[columns], self.lower_VD[columns], part)

    def total(self) -> Tensor:
        """The gradient; nothing is added after that."""
        if self.lower_VD is None:
            self.sum_VD[self.begun :].zero_()
        else:
            self.kernels.round_split_(self.sum_VD, self.lower_VD)
        return self.sum_VD
