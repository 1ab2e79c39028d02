// A block takes a group, a thread one of its numbers.
#include "op.h"

#include "../../include/cuda_portable.h"

namespace kernels {
namespace {

constexpr int threads = int(int4_group);

template <class T>
__global__ void __launch_bounds__(threads) pack_kernel(const void* x, int64_t count, uint8_t* codes, uint16_t* scale, uint16_t* zero) {
  SHARED(float, smallest, threads);
  SHARED(float, greatest, threads);
  SHARED(uint8_t, found, threads);
  const int64_t begin = int64_t(blockIdx.x) * int4_group, i = begin + threadIdx.x;
  // a short group is filled up with its first number, which changes neither of its ends
  const float value = widen(static_cast<const T*>(x)[i < count ? i : begin]);
  smallest[threadIdx.x] = greatest[threadIdx.x] = value;
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      smallest[threadIdx.x] = fminf(smallest[threadIdx.x], smallest[threadIdx.x + half]);
      greatest[threadIdx.x] = fmaxf(greatest[threadIdx.x], greatest[threadIdx.x + half]);
    }
  }
  __syncthreads();
  const Steps steps = Steps::of(smallest[0], greatest[0]);
  found[threadIdx.x] = i < count ? steps.code(value) : 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    scale[blockIdx.x] = steps.scale;
    zero[blockIdx.x] = steps.zero;
  }
  if (threadIdx.x % 2 == 0 && i < count) codes[i / 2] = uint8_t(found[threadIdx.x] | found[threadIdx.x + 1] << 4);
}

}  // namespace

void pack_int4(const void* x, Float type, int64_t count, uint8_t* codes, uint16_t* scale, uint16_t* zero, void* stream) {
  const auto kernel = type == Float::float32 ? pack_kernel<float> : pack_kernel<bfloat16>;
  LAUNCH(kernel, dim3(unsigned((count + int4_group - 1) / int4_group)), dim3(threads), 0, stream)(x, count, codes, scale, zero);
}

}  // namespace kernels
