// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/noise.h"

namespace kernels {

// The k eligible tokens of a sequence with the smallest draws are masked.
struct Counting {
  const int32_t* k;
  Sequences of;
};

void mask_count(const Counting& in, void* stream);

}  // namespace kernels
