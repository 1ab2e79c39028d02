// What the op.cpp of ops on rotated keys share: tensors as rows, and a row turned on a CPU.
#pragma once
#include "cpu_rows.h"
#include "registration.h"
#include "rope_rows.h"

namespace kernels {

inline Rows rows(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

template <class T>
inline void turn_row(const T* __restrict__ from, const Wide<T>* __restrict__ cos, const Wide<T>* __restrict__ sin, int64_t half,
                     T* __restrict__ to) {
  each_lanes<T>(0, half, [&](int64_t j, int64_t present) {
    const Lanes<T> first = get(from + j, present, Wide<T>(0)), second = get(from + j + half, present, Wide<T>(0));
    const Lanes<T> c = get(cos + j, present, Wide<T>(0)), s = get(sin + j, present, Wide<T>(0));
    put(to + j, first * c - second * s, present);
    put(to + j + half, second * c + first * s, present);
  });
}

}  // namespace kernels
