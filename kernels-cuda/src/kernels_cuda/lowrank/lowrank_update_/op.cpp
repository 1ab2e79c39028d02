#include "op.h"

#include <algorithm>
#include <cmath>

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace kernels {
namespace {

// 16 bits for each element of a group.
void group_bits(const Random& random, uint32_t number, uint16_t* found) {
  uint32_t keys[4], words[group / 2];
  random.words(number, keys);
  // independent of one another: the compiler puts them into vectors
  for (uint32_t w = 0; w < group / 2; ++w) words[w] = mixed(keys, w);
  // little-endian: the lower half of a word comes first
  memcpy(found, words, sizeof words);
}

template <class W, class T>
void write_nearest(const Write& by, W* weight, const T* back, int64_t begin, int64_t end) {
  const Write in = by;
  for (int64_t i = begin; i < end; ++i) weight[i] = narrow<W>(in.value(widen(weight[i]), widen(back[i])));
}

template <class T>
void write_at_random(const Write& by, bfloat16* weight, const T* back, int64_t begin, int64_t end) {
  const Write in = by;
  alignas(64) uint16_t bits[group];
  while (begin < end) {
    const int64_t element = in.first + begin, start = element / group * group;
    const int64_t stop = std::min(end, begin + group - (element - start));
    group_bits(in.random, uint32_t(start / group), bits);
    const uint16_t* own = bits + (element - start) - begin;
    for (int64_t i = begin; i < stop; ++i) weight[i].bits = rounded_at_random(in.value(widen(weight[i]), widen(back[i])), own[i]);
    begin = stop;
  }
}

template <class T>
void write_range(const Write& in, const T* back, int64_t begin, int64_t end) {
  if (in.weight_type == Float::float32)
    write_nearest(in, static_cast<float*>(in.weight), back, begin, end);
  else if (in.at_random)
    write_at_random(in, static_cast<bfloat16*>(in.weight), back, begin, end);
  else
    write_nearest(in, static_cast<bfloat16*>(in.weight), back, begin, end);
}

}  // namespace

void lowrank_write(const Write& in, void*) {
  torch::stable::parallel_for(0, in.count, 16384, [&](int64_t begin, int64_t end) {
    if (in.type == Float::float32)
      write_range(in, static_cast<const float*>(in.back), begin, end);
    else
      write_range(in, static_cast<const bfloat16*>(in.back), begin, end);
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void lowrank_write_op(Tensor weight, const Tensor back, double decay, double alpha, int64_t seed, int64_t offset, int64_t first) {
  const Stream stream(weight);
  lowrank_write({weight.data_ptr(), back.data_ptr(), float_type(weight), float_type(back), first, weight.numel(), float(decay), float(alpha),
                 seed >= 0, Random(seed, offset, rounding_stream)},
                stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) { library.impl("lowrank_write_", TORCH_BOX(&kernels::lowrank_write_op)); }
