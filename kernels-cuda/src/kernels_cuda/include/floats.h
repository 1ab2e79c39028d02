// The float types an op may take, shared by the CPU twins, the CUDA kernels and their emulation.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#define KERNELS_FN __host__ __device__ __forceinline__
#else
#define KERNELS_FN inline
#endif

namespace kernels {

enum class Float { float32, float64, bfloat16 };

KERNELS_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

KERNELS_FN float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even; a NaN stays one.
KERNELS_FN uint16_t bfloat16_bits(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#ifdef __CUDACC__
using bfloat16 = __nv_bfloat16;
#else
struct bfloat16 {
  uint16_t bits;
};
#endif

// Sums of T are kept in Wide<T>: float for bfloat16 and float, double for double.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

KERNELS_FN float widen(float value) { return value; }
KERNELS_FN double widen(double value) { return value; }
template <class T>
KERNELS_FN T narrow(Wide<T> value) {
  return value;
}
#ifdef __CUDACC__
KERNELS_FN float widen(bfloat16 value) { return __bfloat162float(value); }
template <>
KERNELS_FN bfloat16 narrow<bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
#else
KERNELS_FN float widen(bfloat16 value) { return float_of(uint32_t(value.bits) << 16); }
template <>
KERNELS_FN bfloat16 narrow<bfloat16>(float value) {
  return {bfloat16_bits(value)};
}
#endif

// Calls run(T{}) with the C++ type of `type`.
template <class Run>
inline void with_type(Float type, Run run) {
  if (type == Float::float32) run(float{});
  if (type == Float::float64) run(double{});
  if (type == Float::bfloat16) run(bfloat16{});
}

}  // namespace kernels
