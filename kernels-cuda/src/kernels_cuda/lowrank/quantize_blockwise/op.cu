#include "op.h"

#include "../../include/blockwise_cuda.h"

namespace kernels {
namespace {

__global__ void __launch_bounds__(blockwise_threads)
    quantize_kernel(const float* x, const float* code, uint8_t* codes, float* absmax, Blocks blocks, bool nonzero) {
  DEVICE_BOOK(book, code);
  const int lane = int(threadIdx.x % 32);
  each_block(blocks, [&](int64_t number) {
    const int64_t begin = blocks.begin(number), size = blocks.size(number);
    uint32_t largest = 0;
    for (int64_t i = lane; i < size; i += 32) {
      const uint32_t bits = bits_of(x[begin + i]) & 0x7fffffffu;
      largest = largest > bits ? largest : bits;
    }
    largest = warp_largest(largest);
    for (int64_t i = lane; i < size; i += 32) codes[begin + i] = book.code_of(x[begin + i], largest, nonzero);
    if (lane == 0) absmax[number] = float_of(largest);
  });
}

}  // namespace

void quantize_blockwise(const float* x, const float* code, uint8_t* codes, float* absmax, Blocks blocks, bool nonzero, void* stream) {
  LAUNCH(quantize_kernel, blockwise_grid(blocks), dim3(blockwise_threads), 0, stream)(x, code, codes, absmax, blocks, nonzero);
}

}  // namespace kernels
