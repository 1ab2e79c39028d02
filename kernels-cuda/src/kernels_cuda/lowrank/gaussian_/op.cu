// A thread takes the four elements of one block of random words.
#include "op.h"

#include "../../include/cuda_portable.h"

namespace kernels {
namespace {

constexpr int threads = 256;

__global__ void __launch_bounds__(threads) gaussian_kernel(float* out, int64_t count, Random random) {
  const int64_t block = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (4 * block >= count) return;
  uint32_t words[4];
  random.words(uint32_t(block), words);
  float found[4];
  normals_of(words[0], words[1], found, found + 1);
  normals_of(words[2], words[3], found + 2, found + 3);
#pragma unroll
  for (int lane = 0; lane < 4; ++lane)
    if (4 * block + lane < count) out[4 * block + lane] = found[lane];
}

}  // namespace

void gaussian(float* out, int64_t count, Random random, void* stream) {
  const int64_t blocks = ((count + 3) / 4 + threads - 1) / threads;
  LAUNCH(gaussian_kernel, dim3(unsigned(blocks)), dim3(threads), 0, stream)(out, count, random);
}

}  // namespace kernels
