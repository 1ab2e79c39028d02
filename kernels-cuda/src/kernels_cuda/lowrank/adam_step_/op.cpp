#include "op.h"

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
#include "../../include/blockwise_cpu.h"

namespace kernels {

namespace {

constexpr int64_t piece = 1024;  // elements that are widened together

template <class T>
void widen_all(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

template <class T>
void narrow_all(const float* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(from[i]);
}

}  // namespace

void adam_step(const void* gradient, Float gradient_type, float* first, float* second, void* out, Float out_type, Adam adam, int64_t count,
               void*) {
  const bool wide = gradient_type == Float::float32, wide_out = out_type == Float::float32;
  torch::stable::parallel_for(0, count, 16384, [&](int64_t begin, int64_t end) {
    alignas(64) float of_gradient[piece], of_out[piece];
    for (int64_t at = begin; at < end; at += piece) {
      const int64_t size = std::min(piece, end - at);
      const float* from = wide ? static_cast<const float*>(gradient) + at : of_gradient;
      float* to = wide_out ? static_cast<float*>(out) + at : of_out;
      if (!wide) widen_all(static_cast<const bfloat16*>(gradient) + at, size, of_gradient);
      if (!wide_out && adam.decay != 0) widen_all(static_cast<const bfloat16*>(out) + at, size, of_out);
      adam_values(adam, from, first + at, second + at, size, to);
      if (!wide_out) narrow_all(of_out, size, static_cast<bfloat16*>(out) + at);
    }
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void adam_step_op(const Tensor gradient, Tensor first, Tensor second, Tensor out, double b1, double b2, double eps, int64_t step,
                  double decay, double alpha) {
  const Stream stream(gradient);
  adam_step(gradient.data_ptr(), float_type(gradient), pointer_to<float>(first), pointer_to<float>(second), out.data_ptr(), float_type(out),
            Adam(b1, b2, eps, step, decay, alpha), gradient.numel(), stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) { library.impl("adam_step_", TORCH_BOX(&kernels::adam_step_op)); }
