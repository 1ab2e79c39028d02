// Kernels with one mistake each, for test_emulation.py.
#include <string>

#include "cuda_portable.h"

namespace {

constexpr int threads = 96;

// The sum of 1..n for n = threads, by shuffles and shared memory: right for every order of threads.
__global__ void block_sum(float* out) {
  SHARED(float, of_warp, threads / 32);
  float mine = float(threadIdx.x + 1);
  for (int distance = 16; distance > 0; distance /= 2) mine += __shfl_xor_sync(kernels::whole_warp, mine, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = of_warp[0] + of_warp[1] + of_warp[2];
}

__global__ void missing_barrier(float* out) {
  SHARED(float, shared, threads);
  shared[threadIdx.x] = 1;
  float sum = 0;
  for (int i = 0; i < threads; ++i) sum += shared[i];
  out[threadIdx.x] = sum;
}

__global__ void divergent_barriers(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void thread_that_left(float*) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void shared_overflow(float* out) {
  SHARED(float, shared, threads);
  shared[threadIdx.x + 1] = 1;
  out[threadIdx.x] = shared[0];
}

__global__ void dynamic_overflow(float*) {
  DYNAMIC_SHARED(float, shared);
  shared[threadIdx.x] = 1;
}

__global__ void unwritten_shared(float* out) {
  SHARED(float, shared, threads);
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void absent_lane(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);
}

__global__ void lanes_that_never_come(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(kernels::whole_warp, 1.0f, 0);
}

__global__ void votes(float* out) { out[threadIdx.x] = float(__ballot_sync(kernels::whole_warp, threadIdx.x % 32 < 3)); }

__global__ void counts(float* out) { atomicAdd(out, 1.0f); }

}  // namespace

// Runs one kernel with two blocks; returns what the emulation reported, or "".
extern "C" __attribute__((visibility("default"))) const char* run(const char* name, float* out, int64_t shared_bytes) {
  static std::string report;
  report.clear();
  const std::string wanted = name;
  try {
#define RUN(kernel) \
  if (wanted == #kernel) LAUNCH(kernel, dim3(2), dim3(threads), shared_bytes, nullptr)(out)
    RUN(block_sum);
    RUN(missing_barrier);
    RUN(divergent_barriers);
    RUN(thread_that_left);
    RUN(shared_overflow);
    RUN(dynamic_overflow);
    RUN(unwritten_shared);
    RUN(absent_lane);
    RUN(lanes_that_never_come);
    RUN(votes);
    RUN(counts);
  } catch (const std::exception& error) {
    report = error.what();
  }
  return report.c_str();
}
