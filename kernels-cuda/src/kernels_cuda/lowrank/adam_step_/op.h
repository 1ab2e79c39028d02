// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/blockwise.h"

namespace kernels {

// One step on `count` elements: both moments in place, and out <- decay out - alpha N.
void adam_step(const float* gradient, float* first, float* second, float* out, Adam adam, int64_t count, void* stream);

}  // namespace kernels
