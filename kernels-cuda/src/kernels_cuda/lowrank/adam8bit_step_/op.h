// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/blockwise.h"

namespace kernels {

// Moments of Adam as codes and largest magnitudes by block.
struct Moments {
  uint8_t* first;
  float* first_absmax;
  uint8_t* second;
  float* second_absmax;
  const float* first_code;   // signed
  const float* second_code;  // unsigned
};

// One step: moments are read, updated and written block by block, and out <- decay out - alpha N.
void adam8bit_step(const float* gradient, Moments moments, float* out, Adam adam, Blocks blocks, void* stream);

}  // namespace kernels
