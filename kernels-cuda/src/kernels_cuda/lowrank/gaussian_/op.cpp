#include "op.h"

#include <algorithm>

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace kernels {
namespace {

constexpr int together = 32;  // blocks of words, so that loops over them become vectors

// The numbers of `together` blocks from number `block` on.
void group(const Random& random, uint32_t block, float* found) {
  uint32_t words[together][4], first[2 * together], second[2 * together];
  for (int i = 0; i < together; ++i) random.words(block + uint32_t(i), words[i]);
  for (int i = 0; i < 2 * together; ++i) {
    first[i] = words[i / 2][i % 2 * 2];
    second[i] = words[i / 2][i % 2 * 2 + 1];
  }
  for (int i = 0; i < 2 * together; ++i) normals_of(first[i], second[i], found + 2 * i, found + 2 * i + 1);
}

}  // namespace

void gaussian(float* out, int64_t count, Random random, void*) {
  constexpr int64_t size = 4 * together;
  torch::stable::parallel_for(0, (count + size - 1) / size, 64, [&](int64_t begin, int64_t end) {
    const Random own = random;
    for (int64_t number = begin; number < end; ++number) {
      alignas(64) float found[size];
      group(own, uint32_t(number * together), found);
      std::copy_n(found, std::min(size, count - number * size), out + number * size);
    }
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void gaussian_op(Tensor out, int64_t seed, int64_t param, int64_t index) {
  const Stream stream(out);
  gaussian(pointer_to<float>(out), out.numel(), Random(seed, int64_t(uint64_t(param) << 32 | uint64_t(index)), projection_stream),
           stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) { library.impl("gaussian_", TORCH_BOX(&kernels::gaussian_op)); }
