// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/noise.h"

namespace kernels {

// Each eligible token is masked with the chance p of its sequence.
struct Masking {
  const float* p;
  Sequences of;

  KERNELS_FN void write(int64_t row, int64_t block, const uint32_t* words) const {
    const float chance = p[row];
    for (int lane = 0; lane < 4 && 4 * block + lane < of.size; ++lane) {
      const int64_t place = 4 * block + lane;
      of.masked[row * of.size + place] = float(words[lane] >> 8) * 0x1p-24f < chance && of.open(row, place);
    }
  }
};

void mask_tokens(const Masking& in, void* stream);

}  // namespace kernels
