// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/blockwise.h"

namespace kernels {

// One step on `count` elements: both moments in place, and out <- decay out - alpha N. Gradient and out are float32 or bfloat16.
void adam_step(const void* gradient, Float gradient_type, float* first, float* second, void* out, Float out_type, Adam adam, int64_t count,
               void* stream);

}  // namespace kernels
