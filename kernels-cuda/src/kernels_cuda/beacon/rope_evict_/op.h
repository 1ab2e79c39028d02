// Launcher of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/rope_rows.h"

namespace kernels {

// Row b loses `count` entries from `first` on; those behind move down, their keys turned by -count. cos and sin are [angles][half]
// (double for double).
struct RopeEvict {
  Float type;
  int64_t batch, heads, half;
  const int32_t* length;
  const int32_t* first;
  const int32_t* count;
  const void* cos;
  const void* sin;
  Rows k, v;

  template <class T>
  KERNELS_FN Wide<T> cosine(int64_t b, int64_t j) const {
    return static_cast<const Wide<T>*>(cos)[count[b] * half + j];
  }
  template <class T>
  KERNELS_FN Wide<T> sine(int64_t b, int64_t j) const {
    return -static_cast<const Wide<T>*>(sin)[count[b] * half + j];
  }
};

void rope_evict(const RopeEvict& in, void* stream);

}  // namespace kernels
