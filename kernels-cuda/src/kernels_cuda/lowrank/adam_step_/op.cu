#include "op.h"

#include "../../include/cuda_portable.h"

namespace kernels {
namespace {

constexpr int adam_threads = 256;

template <class G, class O>
__global__ void __launch_bounds__(adam_threads) adam_kernel(const void* gradient, float* first, float* second, void* out, Adam adam, int64_t count) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  const float of_gradient = widen(static_cast<const G*>(gradient)[i]);
  O* to = static_cast<O*>(out) + i;
  first[i] = adam.first(first[i], of_gradient);
  second[i] = adam.second(second[i], of_gradient);
  *to = narrow<O>(adam.written(widen(*to), adam.normalised(first[i], second[i])));
}

template <class G>
auto kernel_for(Float out) {
  return out == Float::float32 ? adam_kernel<G, float> : adam_kernel<G, bfloat16>;
}

}  // namespace

void adam_step(const void* gradient, Float gradient_type, float* first, float* second, void* out, Float out_type, Adam adam, int64_t count,
               void* stream) {
  const auto kernel = gradient_type == Float::float32 ? kernel_for<float>(out_type) : kernel_for<bfloat16>(out_type);
  LAUNCH(kernel, dim3(unsigned((count + adam_threads - 1) / adam_threads)), dim3(adam_threads), 0, stream)
  (gradient, first, second, out, adam, count);
}

}  // namespace kernels
