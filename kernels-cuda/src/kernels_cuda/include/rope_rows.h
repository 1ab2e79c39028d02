// Keys and values of attention heads whose keys are rotated in pairs (j, j + half), on every device.
#pragma once
#include "floats.h"

namespace kernels {

// [batch][heads][length][2 * half] of any strides, the last being 1.
struct Rows {
  void* data;
  int64_t batch_stride, head_stride, stride;

  template <class T>
  KERNELS_FN T* row(int64_t b, int64_t g, int64_t t) const {
    return static_cast<T*>(data) + b * batch_stride + g * head_stride + t * stride;
  }
};

// A pair of numbers turned by an angle.
template <class T>
struct Turned {
  T first, second;

  KERNELS_FN Turned(T a, T b, Wide<T> cos, Wide<T> sin)
      : first(narrow<T>(widen(a) * cos - widen(b) * sin)), second(narrow<T>(widen(b) * cos + widen(a) * sin)) {}
};

}  // namespace kernels
