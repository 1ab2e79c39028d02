// Writes of a weight in kernels.
#pragma once
#include "cuda_portable.h"
#include "weights.h"

namespace kernels {

__device__ inline void put(float* to, float value, bool, uint16_t) { *to = value; }
__device__ inline void put(bfloat16* to, float value, bool at_random, uint16_t bits) {
  const uint16_t rounded = at_random ? rounded_at_random(value, bits) : bfloat16_bits(value);
  memcpy(to, &rounded, sizeof rounded);
}

}  // namespace kernels
