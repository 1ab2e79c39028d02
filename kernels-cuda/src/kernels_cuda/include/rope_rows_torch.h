// What the op.cpp of ops on rotated keys share: tensors as rows, and a row turned on a CPU.
#pragma once
#include "registration.h"
#include "rope_rows.h"

namespace kernels {

inline Rows rows(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

template <class T>
inline void turn_row(const T* __restrict__ from, const Wide<T>* __restrict__ cos, const Wide<T>* __restrict__ sin, int64_t half,
                     T* __restrict__ to) {
  for (int64_t j = 0; j < half; ++j) {
    const Turned<T> turned(from[j], from[j + half], cos[j], sin[j]);
    to[j] = turned.first;
    to[j + half] = turned.second;
  }
}

}  // namespace kernels
