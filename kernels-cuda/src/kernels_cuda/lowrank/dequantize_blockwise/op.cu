#include "op.h"

#include "../../include/blockwise_cuda.h"

namespace kernels {
namespace {

__global__ void __launch_bounds__(blockwise_threads, blocks_at_once)
    dequantize_kernel(const uint8_t* codes, const float* absmax, const float* code, float* to, Blocks blocks) {
  SHARED(float, value, 256);
  for (int i = int(threadIdx.x); i < 256; i += int(blockDim.x)) value[i] = code[i];
  __syncthreads();
  each_block(blocks, [&](int64_t number) {
    const int64_t begin = blocks.begin(number), size = blocks.size(number);
    const float scale = absmax[number];
    for (int64_t i = threadIdx.x % 32; i < size; i += 32) to[begin + i] = value[codes[begin + i]] * scale;
  });
}

}  // namespace

void dequantize_blockwise(const uint8_t* codes, const float* absmax, const float* code, float* to, Blocks blocks, void* stream) {
  LAUNCH(dequantize_kernel, blockwise_grid(blocks), dim3(blockwise_threads), 0, stream)(codes, absmax, code, to, blocks);
}

}  // namespace kernels
