#include "op.h"

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
#include "../../include/blockwise_cpu.h"

namespace kernels {

void adam_step(const float* gradient, float* first, float* second, float* out, Adam adam, int64_t count, void*) {
  torch::stable::parallel_for(0, count, 16384, [&](int64_t begin, int64_t end) {
    adam_values(adam, gradient + begin, first + begin, second + begin, end - begin, out + begin);
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void adam_step_op(const Tensor gradient, Tensor first, Tensor second, Tensor out, double b1, double b2, double eps, int64_t step,
                  double decay, double alpha) {
  const Stream stream(gradient);
  adam_step(pointer_to<float>(gradient), pointer_to<float>(first), pointer_to<float>(second), pointer_to<float>(out),
            Adam(b1, b2, eps, step, decay, alpha), gradient.numel(), stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) { library.impl("adam_step_", TORCH_BOX(&kernels::adam_step_op)); }
