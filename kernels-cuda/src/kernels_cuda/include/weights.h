// What operators share that write a weight: the step, and random bits for rounding it to bfloat16.
#pragma once
#include <math.h>

#include "philox.h"

namespace kernels {

constexpr uint32_t rounding_stream = 13;  // in the one list of streams

constexpr int64_t group = 1024;  // elements whose random bits come from one block of Philox

// Word `w` of a group, whose halves belong to its elements 2 w and 2 w + 1: a mixer of 32 bits (Wellons, lowbias32) between three
// keys. Philox for every word costs five times as much, and rounding asks for no more than halves that are uniform and show no
// relation between elements.
KERNELS_FN uint32_t mixed(const uint32_t* keys, uint32_t w) {
  uint32_t x = w * 0x9E3779B9u ^ keys[0];
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = ((x ^ x >> 15) + keys[1]) * 0x846CA68Bu;
  return x ^ x >> 16 ^ keys[2];
}

// Some elements of a weight, from number `first` on, and as many of back(N). Both are float32 or bfloat16.
struct Write {
  void* weight;
  const void* back;
  Float weight_type, type;
  int64_t first, count;
  float decay, alpha;
  bool at_random;  // for a bfloat16 weight
  Random random;

  // decay w - alpha b, rounded once before the last rounding. Without decay the weight is not read: it may hold anything.
  KERNELS_FN float value(float w, float b) const { return decay == 0 ? -alpha * b : fmaf(-alpha, b, decay * w); }
};

}  // namespace kernels
