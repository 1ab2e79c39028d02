#include "op.h"

#include <algorithm>
#include <cmath>

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace kernels {
namespace {

constexpr int64_t group = 128;  // elements whose random bits are found together

// 16 bits for each of the elements 8 block to 8 block + 127.
void group_bits(const Random& random, uint32_t block, uint16_t* found) {
  constexpr int blocks = group / 8;
  uint32_t words[blocks][4];
  // independent of one another: the compiler puts them into vectors
  for (int i = 0; i < blocks; ++i) random.words(block + uint32_t(i), words[i]);
  // little-endian: the lower half of a word comes first
  memcpy(found, words, sizeof words);
}

inline float widened(const float* from) { return *from; }
inline float widened(const uint16_t* from) { return float_of(uint32_t(*from) << 16); }

template <class T>
void write_range(const Write& by, const T* back, int64_t begin, int64_t end) {
  const Write in = by;
  alignas(64) uint16_t bits[group];
  while (begin < end) {
    const int64_t element = in.first + begin, start = element / group * group;
    const int64_t stop = std::min(end, begin + group - (element - start));
    if (in.at_random) {
      group_bits(in.random, uint32_t(start / 8), bits);
      const uint16_t* own = bits + (element - start) - begin;
      for (int64_t i = begin; i < stop; ++i) in.weight[i] = rounded_at_random(in.value(in.weight[i], widened(back + i)), own[i]);
    } else {
      for (int64_t i = begin; i < stop; ++i) in.weight[i] = bfloat16_bits(in.value(in.weight[i], widened(back + i)));
    }
    begin = stop;
  }
}

}  // namespace

void lowrank_write(const Write& in, void*) {
  torch::stable::parallel_for(0, in.count, 16384, [&](int64_t begin, int64_t end) {
    if (in.type == Float::float32)
      write_range(in, static_cast<const float*>(in.back), begin, end);
    else
      write_range(in, static_cast<const uint16_t*>(in.back), begin, end);
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void lowrank_write_op(Tensor weight, const Tensor back, double decay, double alpha, int64_t seed, int64_t offset, int64_t first) {
  const Stream stream(weight);
  lowrank_write({pointer_to<uint16_t>(weight), back.data_ptr(), float_type(back), first, weight.numel(), float(decay), float(alpha), seed >= 0,
                 Random(seed, offset, rounding_stream)},
                stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) { library.impl("lowrank_write_", TORCH_BOX(&kernels::lowrank_write_op)); }
