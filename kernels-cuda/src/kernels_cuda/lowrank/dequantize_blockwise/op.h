// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/blockwise.h"

namespace kernels {

// The values that codes and largest magnitudes stand for. `code`: 256 values.
void dequantize_blockwise(const uint8_t* codes, const float* absmax, const float* code, float* to, Blocks blocks, void* stream);

}  // namespace kernels
