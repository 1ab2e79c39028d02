// A thread takes one byte: two numbers.
#include "op.h"

#include "../../include/cuda_portable.h"

namespace kernels {
namespace {

constexpr int threads = 256;

template <class T>
__global__ void __launch_bounds__(threads)
    unpack_kernel(const uint8_t* codes, const uint16_t* scale, const uint16_t* zero, T* out, int64_t count) {
  const int64_t i = 2 * (int64_t(blockIdx.x) * threads + threadIdx.x);
  if (i >= count) return;
  const uint32_t pair = codes[i / 2];
  const float step = from_half(scale[i / int4_group]), least = from_half(zero[i / int4_group]);
  out[i] = narrow<T>(from_int4(pair & 15u, step, least));
  if (i + 1 < count) out[i + 1] = narrow<T>(from_int4(pair >> 4, step, least));
}

}  // namespace

void unpack_int4(const uint8_t* codes, const uint16_t* scale, const uint16_t* zero, void* out, Float type, int64_t count, void* stream) {
  const dim3 blocks(unsigned(((count + 1) / 2 + threads - 1) / threads));
  if (type == Float::float32)
    LAUNCH(unpack_kernel<float>, blocks, dim3(threads), 0, stream)(codes, scale, zero, static_cast<float*>(out), count);
  else
    LAUNCH(unpack_kernel<bfloat16>, blocks, dim3(threads), 0, stream)(codes, scale, zero, static_cast<bfloat16*>(out), count);
}

}  // namespace kernels
