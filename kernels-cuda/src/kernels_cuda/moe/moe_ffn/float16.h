// float16 beside the types of floats.h; no other operator computes in it.
#pragma once
#include "../../include/int4.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace kernels {

#ifdef __CUDACC__
using float16 = __half;
KERNELS_FN float widen(float16 value) { return __half2float(value); }
template <>
KERNELS_FN float16 narrow<float16>(float value) {
  return __float2half_rn(value);
}
#else
struct float16 {
  uint16_t bits;
};
KERNELS_FN float widen(float16 value) { return from_half(value.bits); }
template <>
KERNELS_FN float16 narrow<float16>(float value) {
  return {to_half(value)};
}
#endif

enum class Value { float32, bfloat16, float16 };

// Calls run(T{}) with the C++ type of `type`.
template <class Run>
void with_value(Value type, Run run) {
  if (type == Value::float32) run(float{});
  if (type == Value::bfloat16) run(bfloat16{});
  if (type == Value::float16) run(float16{});
}

}  // namespace kernels
