// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/int4.h"

namespace kernels {

// out[count], float32 or bfloat16, from two codes to a byte
void unpack_int4(const uint8_t* codes, const uint16_t* scale, const uint16_t* zero, void* out, Float type, int64_t count, void* stream);

}  // namespace kernels
