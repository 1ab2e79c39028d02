#include "op.h"

#include "../../include/blockwise_cuda.h"

namespace kernels {
namespace {

__global__ void __launch_bounds__(blockwise_threads)
    adam8bit_kernel(const float* gradient, Moments moments, float* out, Adam adam, Blocks blocks) {
  DEVICE_BOOK(first_book, moments.first_code);
  DEVICE_BOOK(second_book, moments.second_code);
  const int lane = int(threadIdx.x % 32);
  each_block(blocks, [&](int64_t number) {
    const int64_t begin = blocks.begin(number), size = blocks.size(number);
    const float first_scale = moments.first_absmax[number], second_scale = moments.second_absmax[number];
    const auto new_first = [&](int64_t i) { return adam.first(first_book.value[moments.first[i]] * first_scale, gradient[i]); };
    const auto new_second = [&](int64_t i) { return adam.second(second_book.value[moments.second[i]] * second_scale, gradient[i]); };
    uint32_t first_largest = 0, second_largest = 0;
    for (int64_t i = begin + lane; i < begin + size; i += 32) {
      const uint32_t first_bits = bits_of(new_first(i)) & 0x7fffffffu, second_bits = bits_of(new_second(i)) & 0x7fffffffu;
      first_largest = first_largest > first_bits ? first_largest : first_bits;
      second_largest = second_largest > second_bits ? second_largest : second_bits;
    }
    first_largest = warp_largest(first_largest);
    second_largest = warp_largest(second_largest);
    // moments are computed again, from values now in the cache, so that a block may have any size
    for (int64_t i = begin + lane; i < begin + size; i += 32) {
      const float first = new_first(i), second = new_second(i);
      out[i] = adam.written(out[i], adam.normalised(first, second));
      moments.first[i] = first_book.code_of(first, first_largest, false);
      moments.second[i] = second_book.code_of(second, second_largest, true);
    }
    if (lane == 0) {
      moments.first_absmax[number] = float_of(first_largest);
      moments.second_absmax[number] = float_of(second_largest);
    }
  });
}

}  // namespace

void adam8bit_step(const float* gradient, Moments moments, float* out, Adam adam, Blocks blocks, void* stream) {
  LAUNCH(adam8bit_kernel, blockwise_grid(blocks), dim3(blockwise_threads), 0, stream)(gradient, moments, out, adam, blocks);
}

}  // namespace kernels
