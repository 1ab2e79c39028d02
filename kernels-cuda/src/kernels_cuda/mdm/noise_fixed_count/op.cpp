#include "op.h"

#include <algorithm>
#include <vector>

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace kernels {

void mask_count(const Counting& in, void*) {
  const Sequences& of = in.of;
  torch::stable::parallel_for(0, of.rows, 1, [&](int64_t begin, int64_t end) {
    // the draw above, the place below: no two are equal
    std::vector<uint64_t> keys;
    for (int64_t row = begin; row < end; ++row) {
      keys.clear();
      const Random random = of.random(row);
      for (int64_t first = 0; first < of.blocks(); first += word_group)
        each_block(of, random, first, [&](int64_t block, const uint32_t* words) {
          for (int64_t place = 4 * block; place < std::min(4 * block + 4, of.size); ++place)
            if (of.open(row, place)) keys.push_back(uint64_t(words[place % 4]) << 32 | uint64_t(place));
        });
      const auto wanted = keys.begin() + std::min<int64_t>(in.k[row], int64_t(keys.size()));
      if (wanted != keys.end()) std::nth_element(keys.begin(), wanted, keys.end());
      std::fill_n(of.masked + row * of.size, of.size, false);
      for (auto one = keys.begin(); one != wanted; ++one) of.masked[row * of.size + int64_t(uint32_t(*one))] = true;
    }
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void mask_count_op(const Tensor k, const Tensor slot, std::optional<Tensor> eligible, Tensor masked, int64_t key, int64_t stream) {
  const Stream queue(k);
  const Sequences of{pointer_to<int64_t>(slot), pointer_to<bool>(eligible), pointer_to<bool>(masked), masked.size(0), masked.size(1), key,
                     uint32_t(stream)};
  mask_count({pointer_to<int32_t>(k), of}, queue.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(mdm, library) { library.impl("mask_count", TORCH_BOX(&kernels::mask_count_op)); }
