#include "op.h"

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
#include "../../include/blockwise_cpu.h"

namespace kernels {

void dequantize_blockwise(const uint8_t* codes, const float* absmax, const float* code, float* to, Blocks blocks, void*) {
  const Book book(code);
  const int64_t grain = 1 + 16384 / blocks.block;
  torch::stable::parallel_for(0, blocks.count(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t first = blocks.begin(number);
      dequantize_values(book, codes + first, absmax[number], blocks.size(number), to + first);
    }
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void dequantize_blockwise_op(const Tensor codes, const Tensor absmax, const Tensor code, Tensor to, int64_t columns, int64_t block) {
  const Stream stream(codes);
  const Blocks blocks{codes.numel() / columns, columns, block};
  dequantize_blockwise(pointer_to<uint8_t>(codes), pointer_to<float>(absmax), pointer_to<float>(code), pointer_to<float>(to), blocks,
                       stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) { library.impl("dequantize_blockwise", TORCH_BOX(&kernels::dequantize_blockwise_op)); }
