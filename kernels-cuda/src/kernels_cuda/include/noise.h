// What operators share that mask tokens of sequences by draws at their address.
#pragma once
#include <algorithm>

#include "philox.h"

namespace kernels {

// B sequences of `size` tokens, each at an address of its own; `eligible` may be absent.
struct Sequences {
  const int64_t* slot;
  const bool* eligible;
  bool* masked;
  int64_t rows, size, key;
  uint32_t stream;

  KERNELS_FN int64_t blocks() const { return (size + 3) / 4; }
  KERNELS_FN bool open(int64_t row, int64_t place) const { return eligible == nullptr || eligible[row * size + place]; }
  KERNELS_FN Random random(int64_t row) const { return Random(key, slot[row], stream); }
};

// Blocks whose words a C++ loop finds together: independent, so the compiler puts them into vectors.
constexpr int64_t word_group = 16;

// visit(block, words) of the blocks of one group that a sequence has.
template <class Visit>
inline void each_block(const Sequences& in, const Random& random, int64_t first, Visit visit) {
  uint32_t words[word_group][4];
  for (int i = 0; i < word_group; ++i) random.words(uint32_t(first + i), words[i]);
  for (int64_t block = first; block < std::min(first + word_group, in.blocks()); ++block) visit(block, words[block - first]);
}

}  // namespace kernels
