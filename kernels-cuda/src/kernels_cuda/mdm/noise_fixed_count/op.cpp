#include "op.h"

#include <algorithm>
#include <vector>

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace kernels {

void mask_count(const Counting& in, void*) {
  constexpr int64_t group = 16;  // blocks whose words are found together: independent, so the compiler puts them into vectors
  torch::stable::parallel_for(0, in.rows, 1, [&](int64_t begin, int64_t end) {
    // the draw above, the place below: no two are equal
    std::vector<uint64_t> keys;
    for (int64_t row = begin; row < end; ++row) {
      keys.clear();
      const Random random(in.key, in.slot[row], in.stream);
      for (int64_t first = 0; first < in.blocks(); first += group) {
        uint32_t words[group][4];
        for (int i = 0; i < group; ++i) random.words(uint32_t(first + i), words[i]);
        for (int64_t place = 4 * first; place < std::min(4 * (first + group), in.size); ++place)
          if (in.open(row, place)) keys.push_back(uint64_t(words[place / 4 - first][place % 4]) << 32 | uint64_t(place));
      }
      const auto wanted = keys.begin() + std::min<int64_t>(in.k[row], int64_t(keys.size()));
      if (wanted != keys.end()) std::nth_element(keys.begin(), wanted, keys.end());
      std::fill_n(in.masked + row * in.size, in.size, false);
      for (auto one = keys.begin(); one != wanted; ++one) in.masked[row * in.size + int64_t(uint32_t(*one))] = true;
    }
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void mask_count_op(const Tensor k, const Tensor slot, std::optional<Tensor> eligible, Tensor masked, int64_t key, int64_t stream) {
  const Stream queue(k);
  mask_count({pointer_to<int32_t>(k), pointer_to<int64_t>(slot), pointer_to<bool>(eligible), pointer_to<bool>(masked), masked.size(0),
              masked.size(1), key, uint32_t(stream)},
             queue.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(mdm, library) { library.impl("mask_count", TORCH_BOX(&kernels::mask_count_op)); }
