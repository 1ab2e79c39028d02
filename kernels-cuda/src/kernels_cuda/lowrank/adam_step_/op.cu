#include "op.h"

#include "../../include/cuda_portable.h"

namespace kernels {
namespace {

constexpr int adam_threads = 256;

__global__ void __launch_bounds__(adam_threads)
    adam_kernel(const float* gradient, float* first, float* second, float* out, Adam adam, int64_t count) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  first[i] = adam.first(first[i], gradient[i]);
  second[i] = adam.second(second[i], gradient[i]);
  out[i] = adam.written(out[i], adam.normalised(first[i], second[i]));
}

}  // namespace

void adam_step(const float* gradient, float* first, float* second, float* out, Adam adam, int64_t count, void* stream) {
  LAUNCH(adam_kernel, dim3(unsigned((count + adam_threads - 1) / adam_threads)), dim3(adam_threads), 0, stream)
  (gradient, first, second, out, adam, count);
}

}  // namespace kernels
