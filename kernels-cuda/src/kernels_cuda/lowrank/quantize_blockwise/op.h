// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/blockwise.h"

namespace kernels {

// Codes of all of x and the largest magnitude of every block. `code`: 256 sorted values.
void quantize_blockwise(const float* x, const float* code, uint8_t* codes, float* absmax, Blocks blocks, bool nonzero, void* stream);

}  // namespace kernels
