// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include <math.h>

#include "../../include/philox.h"

namespace kernels {

constexpr uint32_t rounding_stream = 13;  // in the one list of streams

// Some elements of a bfloat16 weight, from number `first` on, and as many of back(N).
struct Write {
  uint16_t* weight;
  const void* back;
  Float type;  // of back: float32 or bfloat16
  int64_t first, count;
  float decay, alpha;
  bool at_random;
  Random random;

  // decay w - alpha b, rounded once before the last rounding. Without decay the weight is not read: it may hold anything.
  KERNELS_FN float value(uint16_t w, float b) const {
    return decay == 0 ? -alpha * b : fmaf(-alpha, b, decay * float_of(uint32_t(w) << 16));
  }
};

// weight <- decay weight - alpha back
void lowrank_write(const Write& in, void* stream);

}  // namespace kernels
