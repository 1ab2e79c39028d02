// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/int4.h"

namespace kernels {

// Two codes to a byte of `codes`; a step and an offset (half precision) for each group of 256.
void pack_int4(const void* x, Float type, int64_t count, uint8_t* codes, uint16_t* scale, uint16_t* zero, void* stream);

}  // namespace kernels
