// What recurrences over tokens share: where sequences lie, and which states are kept for backward.
#pragma once
#include "floats.h"

namespace kernels {

// A state is kept before every `chunk_tokens` tokens; backward computes those between again.
constexpr int chunk_tokens = 32;
// That of kernels which go by chunks of 16 tokens.
constexpr int segment_tokens = 64;

// Either `count` sequences of `length` tokens, or one row of `tokens` tokens in which sequence i starts at starts[i].
struct Sequences {
  int64_t count, length, tokens, heads;
  const int32_t* starts;  // count + 1 numbers, or null
  const bool* mask;       // [tokens], or null; a token where it is false changes nothing and gives 0

  // Clamped: nobody can look at `starts` on a GPU in time to raise.
  KERNELS_FN int64_t begin(int64_t sequence) const {
    if (!starts) return sequence * length;
    const int64_t start = starts[sequence] < 0 ? 0 : starts[sequence];
    return start < tokens ? start : tokens;
  }
  KERNELS_FN int64_t end(int64_t sequence) const {
    const int64_t from = begin(sequence), to = begin(sequence + 1);
    return to > from ? to : from;
  }
  // Room for the states of each sequence, without knowing the lengths of the others.
  KERNELS_FN int64_t first_chunk(int64_t sequence, int64_t each = chunk_tokens) const { return begin(sequence) / each + sequence; }
  KERNELS_FN bool counts(int64_t token) const { return !mask || mask[token]; }
};

}  // namespace kernels
