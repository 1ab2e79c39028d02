// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/weights.h"

namespace kernels {

// A gradient, float32 or bfloat16, and what its rows (axis 0) or columns (axis 1) are multiplied by; or one factor for all.
struct Channels {
  const void* gradient;
  Float type;
  const float* factor;
  bool one, by_rows;
  int64_t columns;

  // of element (row, column)
  KERNELS_FN float of(int64_t row, int64_t column) const { return factor[one ? 0 : by_rows ? row : column]; }
};

// sums[row] <- the sum of squares of a row of the scaled gradient
void channel_squares(const Channels& in, float* sums, int64_t rows, void* stream);

// weight <- decay weight - alpha (back + scaled gradient); `back` may be absent
void channel_write(const Write& in, const Channels& channels, void* stream);

}  // namespace kernels
