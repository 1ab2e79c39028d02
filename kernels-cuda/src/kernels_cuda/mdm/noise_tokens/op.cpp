#include "op.h"

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace kernels {

void mask_tokens(const Masking& in, void*) {
  const int64_t groups = (in.of.blocks() + word_group - 1) / word_group;
  torch::stable::parallel_for(0, in.of.rows * groups, 64, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t row = number / groups;
      each_block(in.of, in.of.random(row), number % groups * word_group,
                 [&](int64_t block, const uint32_t* words) { in.write(row, block, words); });
    }
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void mask_tokens_op(const Tensor p, const Tensor slot, std::optional<Tensor> eligible, Tensor masked, int64_t key, int64_t stream) {
  const Stream queue(p);
  const Sequences of{pointer_to<int64_t>(slot), pointer_to<bool>(eligible), pointer_to<bool>(masked), masked.size(0), masked.size(1), key,
                     uint32_t(stream)};
  mask_tokens({pointer_to<float>(p), of}, queue.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(mdm, library) { library.impl("mask_tokens", TORCH_BOX(&kernels::mask_tokens_op)); }
