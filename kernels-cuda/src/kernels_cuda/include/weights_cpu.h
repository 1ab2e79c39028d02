// Writes of a weight on the CPU.
#pragma once
#include <algorithm>

#include "weights.h"

namespace kernels {

// 16 bits for each element of a group.
inline void group_bits(const Random& random, uint32_t number, uint16_t* found) {
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

}  // namespace kernels
