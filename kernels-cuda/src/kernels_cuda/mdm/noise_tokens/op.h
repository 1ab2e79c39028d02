// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/philox.h"

namespace kernels {

// Sequences of `size` tokens; `eligible` may be absent.
struct Masking {
  const float* p;
  const int64_t* slot;
  const bool* eligible;
  bool* masked;
  int64_t rows, size, key;
  uint32_t stream;

  KERNELS_FN int64_t blocks() const { return (size + 3) / 4; }
  KERNELS_FN void write(int64_t row, int64_t block, const uint32_t* words) const {
    const float chance = p[row];
    for (int lane = 0; lane < 4 && 4 * block + lane < size; ++lane) {
      const int64_t at = row * size + 4 * block + lane;
      masked[at] = float(words[lane] >> 8) * 0x1p-24f < chance && (eligible == nullptr || eligible[at]);
    }
  }
};

void mask_tokens(const Masking& in, void* stream);

}  // namespace kernels
