#include "op.h"

#include <algorithm>

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace kernels {

void mask_tokens(const Masking& in, void*) {
  constexpr int64_t group = 16;  // blocks whose words are found together: independent, so the compiler puts them into vectors
  const int64_t groups = (in.blocks() + group - 1) / group;
  torch::stable::parallel_for(0, in.rows * groups, 64, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t row = number / groups, first = number % groups * group;
      const Random random(in.key, in.slot[row], in.stream);
      uint32_t words[group][4];
      for (int i = 0; i < group; ++i) random.words(uint32_t(first + i), words[i]);
      for (int64_t block = first; block < std::min(first + group, in.blocks()); ++block) in.write(row, block, words[block - first]);
    }
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void mask_tokens_op(const Tensor p, const Tensor slot, std::optional<Tensor> eligible, Tensor masked, int64_t key, int64_t stream) {
  const Stream queue(p);
  mask_tokens({pointer_to<float>(p), pointer_to<int64_t>(slot), pointer_to<bool>(eligible), pointer_to<bool>(masked), masked.size(0),
               masked.size(1), key, uint32_t(stream)},
              queue.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(mdm, library) { library.impl("mask_tokens", TORCH_BOX(&kernels::mask_tokens_op)); }
