// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include <cmath>

#include "../../include/floats.h"

namespace kernels {

// Rows of [rows][size], log-sums of [rows], all dense; log-sums are Wide.
struct SegmentMerge {
  Float type;
  int64_t rows, size;
  const void *out_a, *lse_a, *out_b, *lse_b;
};

// What each part weighs: exp(lse - log(exp(lse_a) + exp(lse_b))), zero where nobody saw anything.
template <class Real>
struct Weights {
  Real a, b, lse;

  KERNELS_FN Weights(Real lse_a, Real lse_b) {
    const Real infinity = Real(INFINITY), highest = lse_a > lse_b ? lse_a : lse_b;
    const bool some = highest > -infinity;
    a = some ? exp(lse_a - highest) : Real(0);
    b = some ? exp(lse_b - highest) : Real(0);
    const Real total = a + b;
    lse = some ? highest + log(total) : -infinity;
    a = some ? a / total : Real(0);
    b = some ? b / total : Real(0);
  }
};

void segment_merge_forward(const SegmentMerge& in, void* out, void* lse, void* stream);

// dout [rows][size], dlse [rows] -> gradients of all four.
void segment_merge_backward(const SegmentMerge& in, const void* dout, const void* dlse, void* dout_a, void* dlse_a, void* dout_b,
                            void* dlse_b, void* stream);

}  // namespace kernels
