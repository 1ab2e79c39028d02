// Blocks of codes on a GPU: a warp per block, code books in shared memory.
#pragma once
#include "blockwise.h"
#include "cuda_portable.h"

namespace kernels {

constexpr int blockwise_threads = 256;
constexpr int64_t blockwise_warps = blockwise_threads / 32;
constexpr int num_device_cells = 2 * (int(last_cell) + 1);
// per processor; told to the compiler where it would otherwise spill registers to fit more
constexpr int blocks_at_once = 4;

// A warp takes several blocks, so that a code book is prepared for more than a few of them.
inline dim3 blockwise_grid(const Blocks& blocks) {
  const int64_t needed = (blocks.count() + blockwise_warps - 1) / blockwise_warps;
  return dim3(unsigned(needed < 2048 ? needed : 2048));
}

// In shared memory.
struct DeviceBook {
  float* value;
  float* bound;
  uint8_t* lowest;  // number of bounds in lower cells

  // Cells sorted by quotient, of the same width everywhere.
  static __device__ int cell_of(float quotient) {
    const uint32_t bits = bits_of(quotient);
    const int magnitude = int(magnitude_of(bits));
    return bits >> 31 ? int(last_cell) - magnitude : int(last_cell) + 1 + magnitude;
  }

  // By all threads of the block; ends with a barrier.
  __device__ void prepare(const float* code) {
    for (int i = int(threadIdx.x); i < 256; i += int(blockDim.x)) {
      value[i] = code[i];
      bound[i] = i < 255 ? bound_between(code[i], code[i + 1]) : INFINITY;
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < 256; i += int(blockDim.x)) {
      const int begin = i == 0 ? 0 : cell_of(bound[i - 1]) + 1;
      const int end = i == 255 ? num_device_cells : cell_of(bound[i]) + 1;
      for (int cell = begin; cell < end; ++cell) lowest[cell] = uint8_t(i);
    }
    __syncthreads();
  }

  __device__ uint8_t nearest(float quotient) const {
    int code = lowest[cell_of(quotient)];
    while (quotient > bound[code]) ++code;
    return uint8_t(code);
  }

  // `nonzero`: a value above 0 never takes code 0.
  __device__ uint8_t code_of(float x, uint32_t largest, bool nonzero) const {
    if (!is_finite_bits(largest)) return 0;
    const uint8_t code = nearest(x / (largest ? float_of(largest) : 1.0f));
    return nonzero && code == 0 && x > 0 ? 1 : code;
  }
};

#define DEVICE_BOOK(name, code)                               \
  SHARED(float, name##_value, 256);                           \
  SHARED(float, name##_bound, 256);                           \
  SHARED(uint8_t, name##_lowest, num_device_cells);           \
  DeviceBook name{name##_value, name##_bound, name##_lowest}; \
  name.prepare(code)

__device__ __forceinline__ uint32_t warp_largest(uint32_t bits) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(whole_warp, bits, distance);
    bits = bits > other ? bits : other;
  }
  return bits;
}

// visit(number of a block) for all blocks of this warp.
template <class Visit>
__device__ __forceinline__ void each_block(const Blocks& blocks, Visit visit) {
  const int64_t step = int64_t(gridDim.x) * blockwise_warps;
  for (int64_t number = blockIdx.x * blockwise_warps + threadIdx.x / 32; number < blocks.count(); number += step) visit(number);
}

}  // namespace kernels
