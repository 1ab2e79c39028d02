// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/philox.h"

namespace kernels {

// `rows` rows of `width` logits, of which the first `valid` may be chosen; what is chosen of each goes to token, logprob, confidence.
struct Reveal {
  const void* logits;
  const int64_t *slot, *pos;
  int64_t* token;
  float *logprob, *confidence;
  int64_t rows, width, valid;
  double temperature;
  int64_t top_k;
  double top_p;
  int64_t key;
  uint32_t stream;

  KERNELS_FN bool restricted() const { return top_k > 0 || top_p < 1; }
  // 53 bits of the words of a row's place.
  KERNELS_FN double uniform(int64_t row) const {
    uint32_t words[4];
    Random(key, slot[row], stream).words(uint32_t(pos[row]), words);
    return double(uint64_t(words[0] >> 5) << 26 | words[1] >> 6) * 0x1p-53;
  }
};

void reveal(const Reveal& in, Float type, void* stream);

}  // namespace kernels
