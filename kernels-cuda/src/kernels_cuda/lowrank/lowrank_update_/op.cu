// A thread takes eight elements, 16 random bits each.
#include <cmath>

#include "../../include/weights_cuda.h"
#include "op.h"

namespace kernels {
namespace {

constexpr int flat_threads = 256;

template <class W, class T>
__global__ void __launch_bounds__(flat_threads) write_kernel(Write in) {
  const int64_t eight = in.first / 8 + int64_t(blockIdx.x) * flat_threads + threadIdx.x;
  W* weight = static_cast<W*>(in.weight);
  uint32_t keys[4];
  if (in.at_random) in.random.words(uint32_t(eight / (group / 8)), keys);
#pragma unroll
  for (int place = 0; place < 8; ++place) {
    const int64_t i = 8 * eight + place - in.first;
    if (i < 0 || i >= in.count) continue;
    const uint32_t word = in.at_random ? mixed(keys, uint32_t(8 * eight % group + place) / 2) : 0;
    put(weight + i, in.value(widen(weight[i]), widen(static_cast<const T*>(in.back)[i])), in.at_random,
        uint16_t(word >> (16 * (place % 2))));
  }
}

template <class W>
auto kernel_for(Float back) {
  return back == Float::float32 ? write_kernel<W, float> : write_kernel<W, bfloat16>;
}

}  // namespace

void lowrank_write(const Write& in, void* stream) {
  if (in.count == 0) return;
  const int64_t blocks = (in.first + in.count + 7) / 8 - in.first / 8;
  const auto kernel = in.weight_type == Float::float32 ? kernel_for<float>(in.type) : kernel_for<bfloat16>(in.type);
  LAUNCH(kernel, dim3(unsigned((blocks + flat_threads - 1) / flat_threads)), dim3(flat_threads), 0, stream)(in);
}

}  // namespace kernels
