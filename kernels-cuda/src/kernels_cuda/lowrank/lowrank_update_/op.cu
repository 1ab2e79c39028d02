// A thread takes the eight elements of one block of random words, 16 bits each.
#include <cmath>

#include "../../include/cuda_portable.h"
#include "op.h"

namespace kernels {
namespace {

constexpr int flat_threads = 256;

template <class T>
__global__ void __launch_bounds__(flat_threads) write_kernel(Write in) {
  const int64_t block = in.first / 8 + int64_t(blockIdx.x) * flat_threads + threadIdx.x;
  uint32_t words[4];
  if (in.at_random) in.random.words(uint32_t(block), words);
#pragma unroll
  for (int place = 0; place < 8; ++place) {
    const int64_t i = 8 * block + place - in.first;
    if (i < 0 || i >= in.count) continue;
    const float value = in.value(in.weight[i], widen(static_cast<const T*>(in.back)[i]));
    in.weight[i] = in.at_random ? rounded_at_random(value, uint16_t(words[place / 2] >> (16 * (place % 2)))) : bfloat16_bits(value);
  }
}

}  // namespace

void lowrank_write(const Write& in, void* stream) {
  if (in.count == 0) return;
  const int64_t blocks = (in.first + in.count + 7) / 8 - in.first / 8;
  const auto kernel = in.type == Float::float32 ? write_kernel<float> : write_kernel<bfloat16>;
  LAUNCH(kernel, dim3(unsigned((blocks + flat_threads - 1) / flat_threads)), dim3(flat_threads), 0, stream)(in);
}

}  // namespace kernels
