#include "op.h"

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
#include <vector>

#include "../../include/blockwise_cpu.h"

namespace kernels {

void adam8bit_step(const float* gradient, Moments moments, float* out, Adam adam, Blocks blocks, void*) {
  const Book first_book(moments.first_code), second_book(moments.second_code);
  const int64_t grain = 1 + 16384 / blocks.block;
  torch::stable::parallel_for(0, blocks.count(), grain, [&](int64_t begin, int64_t end) {
    // a block of unquantised moments, which stay in the first-level cache
    std::vector<float> buffer(size_t(2 * std::min(blocks.block, blocks.columns)));
    float *first = buffer.data(), *second = first + buffer.size() / 2;
    for (int64_t number = begin; number < end; ++number) {
      const int64_t at = blocks.begin(number), size = blocks.size(number);
      dequantize_values(first_book, moments.first + at, moments.first_absmax[number], size, first);
      dequantize_values(second_book, moments.second + at, moments.second_absmax[number], size, second);
      adam_values(adam, gradient + at, first, second, size, out + at);
      moments.first_absmax[number] = quantize_values(first_book, first, size, false, moments.first + at);
      moments.second_absmax[number] = quantize_values(second_book, second, size, true, moments.second + at);
    }
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void adam8bit_step_op(const Tensor gradient, Tensor first, Tensor first_absmax, Tensor second, Tensor second_absmax,
                      const Tensor first_code, const Tensor second_code, Tensor out, double b1, double b2, double eps, int64_t step,
                      int64_t columns, int64_t block, double decay, double alpha) {
  const Stream stream(gradient);
  const Moments moments{pointer_to<uint8_t>(first),       pointer_to<float>(first_absmax), pointer_to<uint8_t>(second),
                        pointer_to<float>(second_absmax), pointer_to<float>(first_code),   pointer_to<float>(second_code)};
  adam8bit_step(pointer_to<float>(gradient), moments, pointer_to<float>(out), Adam(b1, b2, eps, step, decay, alpha),
                Blocks{gradient.numel() / columns, columns, block}, stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) { library.impl("adam8bit_step_", TORCH_BOX(&kernels::adam8bit_step_op)); }
