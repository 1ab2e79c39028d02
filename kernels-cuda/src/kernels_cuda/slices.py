"""Gradients and sums over tokens that kernels leave in parts, so that their order depends neither on threads nor on blocks."""

from __future__ import annotations

SLICE_TOKENS = 256  # as in token_slices.h


def num_slices(tokens: int) -> int:
    """Partial sums over this many tokens."""
    return -(-tokens // SLICE_TOKENS)
