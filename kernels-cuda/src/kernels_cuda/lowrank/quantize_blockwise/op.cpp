#include "op.h"

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
#include "../../include/blockwise_cpu.h"

namespace kernels {

void quantize_blockwise(const float* x, const float* code, uint8_t* codes, float* absmax, Blocks blocks, bool nonzero, void*) {
  const Book book(code);
  const int64_t grain = 1 + 16384 / blocks.block;
  torch::stable::parallel_for(0, blocks.count(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t first = blocks.begin(number);
      absmax[number] = quantize_values(book, x + first, blocks.size(number), nonzero, codes + first);
    }
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void quantize_blockwise_op(const Tensor x, const Tensor code, Tensor codes, Tensor absmax, int64_t columns, int64_t block, bool nonzero) {
  const Stream stream(x);
  const Blocks blocks{x.numel() / columns, columns, block};
  quantize_blockwise(pointer_to<float>(x), pointer_to<float>(code), pointer_to<uint8_t>(codes), pointer_to<float>(absmax), blocks, nonzero,
                     stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) { library.impl("quantize_blockwise", TORCH_BOX(&kernels::quantize_blockwise_op)); }
