// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/philox.h"

namespace kernels {

// Sequences of `size` tokens; `eligible` may be absent.
struct Counting {
  const int32_t* k;
  const int64_t* slot;
  const bool* eligible;
  bool* masked;
  int64_t rows, size, key;
  uint32_t stream;

  KERNELS_FN int64_t blocks() const { return (size + 3) / 4; }
  KERNELS_FN bool open(int64_t row, int64_t place) const { return eligible == nullptr || eligible[row * size + place]; }
};

void mask_count(const Counting& in, void* stream);

}  // namespace kernels
