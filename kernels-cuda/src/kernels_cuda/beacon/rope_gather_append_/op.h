// Launcher of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/rope_rows.h"

namespace kernels {

// Entry n of row b goes from place src[b][n] to index place[b][n] of memory (below 0: nowhere), turned by the angle of that index:
// cos and sin are [positions][half] (double for double).
struct RopeAppend {
  Float type;
  int64_t batch, heads, entries, half;
  const int64_t* src;
  const int64_t* place;
  const void* cos;
  const void* sin;
  Rows k, v, k_mem, v_mem;
};

void rope_gather_append(const RopeAppend& in, void* stream);

}  // namespace kernels
