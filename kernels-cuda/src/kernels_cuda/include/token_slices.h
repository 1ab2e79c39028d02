// Gradients that are sums over tokens: every `slice_tokens` of them give one partial sum, which torch adds up, so that the
// order of a sum depends neither on threads nor on blocks.
#pragma once
#include "floats.h"

namespace kernels {

constexpr int64_t slice_tokens = 256;  // as in slices.py

KERNELS_FN int64_t num_slices(int64_t tokens) { return (tokens + slice_tokens - 1) / slice_tokens; }
KERNELS_FN int64_t slice_end(int64_t slice, int64_t tokens) {
  const int64_t end = (slice + 1) * slice_tokens;
  return end < tokens ? end : tokens;
}

}  // namespace kernels
