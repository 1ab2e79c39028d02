// What a .cu file includes: nvcc compiles it for a GPU, g++ for the emulation. No torch headers.
// Rules for kernels: launch and declare shared memory by the macros below; put PTX into small functions that have a
// plain C++ branch for the emulation; compute indices in int64_t.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// LAUNCH(kernel, grid, block, dynamic shared bytes, stream)(arguments...). Throws if the launch is refused.
#define LAUNCH(kernel, grid, block, shared_bytes, stream)                                                        \
  [&](auto... arguments) {                                                                                       \
    if ((shared_bytes) > 48 * 1024)                                                                              \
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));              \
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);                      \
    const cudaError_t status = cudaGetLastError();                                                               \
    if (status != cudaSuccess) throw std::runtime_error(std::string(#kernel ": ") + cudaGetErrorString(status)); \
  }
// SHARED(float, name, 32): an array shared by the block.
#define SHARED(type, name, count) __shared__ type name[count]
// DYNAMIC_SHARED(float, name): the memory asked for at the launch.
#define DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)
// DYNAMIC_PART(float, name, 32, 128): 32 floats from byte 128 of the memory asked for at the launch; the emulation keeps parts apart.
#define DYNAMIC_PART(type, name, count, offset) type* const name = reinterpret_cast<type*>(kernels::dynamic_shared() + (offset))
#else
#include "emulation.h"

#define LAUNCH(kernel, grid, block, shared_bytes, stream)               \
  [&](auto... arguments) {                                              \
    (void)(stream);                                                     \
    emulation::launch(grid, block, shared_bytes, kernel, arguments...); \
  }
#define SHARED(type, name, count)    \
  static const char name##_site = 0; \
  type* const name = static_cast<type*>(emulation::Block::here()->allocate(&name##_site, sizeof(type) * (count)))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulation::Block::here()->dynamic())
#define DYNAMIC_PART(type, name, count, offset) SHARED(type, name, count)
#endif

#include "floats.h"

namespace kernels {

constexpr uint32_t whole_warp = 0xffffffffu;

#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}
#endif

// 16 bytes that move in one instruction.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

// Visits a row of `count` values with all threads of the block: visit(values, first, size) gets up to 16 bytes of
// neighbours, widened; what it changes is written back if `write`. Any alignment of T, any count.
template <bool write, class T, class Visit>
__device__ __forceinline__ void visit_row(T* row, int64_t count, Visit visit) {
  constexpr int size = Pack<T>::size;
  const auto visit_one = [&](int64_t i) {
    Wide<T> value[1] = {widen(row[i])};
    visit(value, i, 1);
    if (write) row[i] = narrow<T>(value[0]);
  };
  const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(row) / sizeof(T)) % size;
  const int64_t to_alignment = misaligned ? size - misaligned : 0;
  const int64_t head = to_alignment < count ? to_alignment : count;
  const int64_t packs = (count - head) / size;
  const int64_t tail = head + packs * size;
  if (threadIdx.x < head) visit_one(threadIdx.x);
  Pack<T>* body = reinterpret_cast<Pack<T>*>(row + head);
  for (int64_t k = threadIdx.x; k < packs; k += blockDim.x) {
    Pack<T> pack = body[k];
    Wide<T> values[size];
    for (int i = 0; i < size; ++i) values[i] = widen(pack.values[i]);
    visit(values, head + k * size, size);
    if (write) {
      for (int i = 0; i < size; ++i) pack.values[i] = narrow<T>(values[i]);
      body[k] = pack;
    }
  }
  if (tail + threadIdx.x < count) visit_one(tail + threadIdx.x);
}

}  // namespace kernels
