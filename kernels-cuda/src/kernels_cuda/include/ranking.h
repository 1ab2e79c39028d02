// Which of a token's experts have the largest logits: shared by route and noisy_load, and by their CPU twins and kernels.
#pragma once
#include "floats.h"

namespace kernels {

constexpr int64_t max_experts = 256, max_selects = 16;  // as in gates.py

// A number that is larger for what comes first: for a larger logit, or the lower expert of two equals. A NaN comes before all
// numbers, so that it is seen. No number is zero or has all bits set, and no two of a row are equal.
KERNELS_FN uint64_t rank_key(float value, uint32_t expert) {
  // -0 becomes 0
  const uint32_t bits = bits_of(value + 0.0f), ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return uint64_t(value == value ? ordered : 0xfffffffeu) << 32 | (0xffffffffu - expert);
}

KERNELS_FN float value_of_key(uint64_t key) {
  const uint32_t ordered = uint32_t(key >> 32);
  return float_of(ordered >> 31 ? ordered ^ 0x80000000u : ~ordered);
}

KERNELS_FN int32_t expert_of_key(uint64_t key) { return int32_t(0xffffffffu - uint32_t(key)); }

// The `count` first of a row in order, for the CPU.
struct Top {
  float value[max_selects + 1];
  int32_t index[max_selects + 1];

  void find(const float* row, int64_t experts, int64_t count) {
    uint64_t keys[max_experts], last = ~uint64_t(0);
    for (int64_t j = 0; j < experts; ++j) keys[j] = rank_key(row[j], uint32_t(j));
    for (int64_t i = 0; i < count; ++i) {
      // without branches, so that compilers take many at a time
      uint64_t first = 0;
      for (int64_t j = 0; j < experts; ++j) {
        const uint64_t key = keys[j] < last ? keys[j] : 0;
        first = key > first ? key : first;
      }
      value[i] = value_of_key(first);
      index[i] = expert_of_key(first);
      last = first;
    }
  }
};

}  // namespace kernels
