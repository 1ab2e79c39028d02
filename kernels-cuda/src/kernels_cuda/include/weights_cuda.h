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

// A thread's eight elements, 16 random bits each: change(i) is what `alpha` multiplies in element i.
constexpr int write_threads = 256;

template <class W, class Change>
__device__ void write_eight(const Write& in, Change change) {
  const int64_t eight = in.first / 8 + int64_t(blockIdx.x) * write_threads + threadIdx.x;
  W* weight = static_cast<W*>(in.weight);
  uint32_t keys[4];
  if (in.at_random) in.random.words(uint32_t(eight / (group / 8)), keys);
#pragma unroll
  for (int place = 0; place < 8; ++place) {
    const int64_t i = 8 * eight + place - in.first;
    if (i < 0 || i >= in.count) continue;
    const uint32_t word = in.at_random ? mixed(keys, uint32_t(8 * eight % group + place) / 2) : 0;
    put(weight + i, in.value(widen(weight[i]), change(i)), in.at_random, uint16_t(word >> (16 * (place % 2))));
  }
}

inline dim3 write_blocks(const Write& in) {
  const int64_t eights = (in.first + in.count + 7) / 8 - in.first / 8;
  return dim3(unsigned((eights + write_threads - 1) / write_threads));
}

}  // namespace kernels
