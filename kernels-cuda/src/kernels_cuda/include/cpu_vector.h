// 16 floats at a time on any CPU: the compiler's vector types become AVX-512, AVX2, SSE or NEON code.
#pragma once
#include <utility>

#include "floats.h"

namespace kernels {
#define KERNELS_VECTOR_BYTES 64
#include "cpu_vector_body.h"
#undef KERNELS_VECTOR_BYTES
}  // namespace kernels
