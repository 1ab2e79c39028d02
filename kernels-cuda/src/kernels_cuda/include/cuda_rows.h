// Rows of logits on a GPU: a block of threads for each.
#pragma once
#include <cfloat>
#include <cmath>

#include "cuda_portable.h"

namespace kernels {

constexpr int row_threads = 512;

// A `Part` is what one thread knows of a row: numbers of the type Part::Real, which joined(Part, Part) puts together.
template <class Part, class Shuffle>
__device__ __forceinline__ Part shuffled(Part part, Shuffle shuffle) {
  using Real = typename Part::Real;
  Real* values = reinterpret_cast<Real*>(&part);
#pragma unroll
  for (int i = 0; i < int(sizeof(Part) / sizeof(Real)); ++i) values[i] = shuffle(values[i]);
  return part;
}

// Complete in lane 0.
template <class Part>
__device__ __forceinline__ Part joined_by_warp(Part mine) {
  using Real = typename Part::Real;
  for (int distance = 16; distance > 0; distance /= 2)
    mine = joined(mine, shuffled(mine, [&](Real value) { return __shfl_xor_sync(whole_warp, value, distance); }));
  return mine;
}

// The same in every thread, joined in a fixed order. `none` adds nothing to another part.
template <class Part>
__device__ __forceinline__ Part joined_by_block(Part mine, Part none) {
  using Real = typename Part::Real;
  constexpr int num_warps = row_threads / 32;
  SHARED(Part, of_warp, num_warps);
  const int lane = threadIdx.x % 32;
  mine = joined_by_warp(mine);
  __syncthreads();  // what an earlier call left is still read
  if (lane == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  mine = joined_by_warp(lane < num_warps ? of_warp[lane] : none);
  return shuffled(mine, [](Real value) { return __shfl_sync(whole_warp, value, 0); });
}

// The maximum of a part of a row and the sum of exp(x - maximum). Starting from the lowest finite number instead of
// -infinity keeps exp(-infinity - maximum) a zero.
template <class R>
struct LogSum {
  using Real = R;
  Real maximum, total;

  __device__ __forceinline__ Real value() const { return maximum + log(total); }
  template <class Values>
  __device__ __forceinline__ void add(const Values* values, int size) {
    Real highest = maximum;
    for (int i = 0; i < size; ++i) highest = values[i] > highest ? values[i] : highest;
    total *= exp(maximum - highest);
    for (int i = 0; i < size; ++i) total += exp(values[i] - highest);
    maximum = highest;
  }
};
template <class Real>
constexpr Real lowest = Real(-FLT_MAX);

template <class Real>
__device__ __forceinline__ LogSum<Real> joined(LogSum<Real> a, LogSum<Real> b) {
  const Real maximum = a.maximum > b.maximum ? a.maximum : b.maximum;
  return {maximum, a.total * exp(a.maximum - maximum) + b.total * exp(b.maximum - maximum)};
}

// Of a whole row, by all threads of the block.
template <class T>
__device__ __forceinline__ LogSum<Wide<T>> log_sum_of(const T* row, int64_t count) {
  const LogSum<Wide<T>> none = {lowest<Wide<T>>, 0};
  LogSum<Wide<T>> mine = none;
  visit_row<false>(const_cast<T*>(row), count, [&](Wide<T>* values, int64_t, int size) { mine.add(values, size); });
  return joined_by_block(mine, none);
}

}  // namespace kernels
