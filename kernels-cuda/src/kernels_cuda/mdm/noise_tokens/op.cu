// A thread takes the four tokens of one block of random words.
#include "op.h"

#include "../../include/cuda_portable.h"

namespace kernels {
namespace {

constexpr int threads = 256;

__global__ void __launch_bounds__(threads) mask_kernel(Masking in) {
  const int64_t number = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (number >= in.of.rows * in.of.blocks()) return;
  const int64_t row = number / in.of.blocks(), block = number % in.of.blocks();
  uint32_t words[4];
  in.of.random(row).words(uint32_t(block), words);
  in.write(row, block, words);
}

}  // namespace

void mask_tokens(const Masking& in, void* stream) {
  const int64_t count = (in.of.rows * in.of.blocks() + threads - 1) / threads;
  LAUNCH(mask_kernel, dim3(unsigned(count)), dim3(threads), 0, stream)(in);
}

}  // namespace kernels
