// Numbers in 4 bits: groups of 256 are cut into 15 equal steps from their least to their greatest, and step and least are kept in half
// precision. Two codes share a byte, the first in its lower half. Every result is the same bit for bit on all devices.
#pragma once
#include <math.h>

#include "floats.h"

namespace kernels {

constexpr int64_t int4_group = 256;

// Half precision by its bits, so that no compiler has to know the type. Denormals included, rounded to nearest even.
KERNELS_FN float from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, size = half & 0x7fffu;
  if (size >= 0x7c00u) return float_of(sign | 0x7f800000u | size << 13);
  if (size >= 0x400u) return float_of(sign | ((size << 13) + 0x38000000u));
  const float value = float(size) * 0x1p-24f;
  return sign ? -value : value;
}

KERNELS_FN uint16_t to_half(float value) {
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  if (size > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  // below the normal numbers the sum is rounded at the last bit of a denormal half
  if (size < 0x38800000u) return uint16_t(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000u));
  return uint16_t(sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13));
}

// What a group's numbers are coded by.
struct Steps {
  uint16_t scale, zero;
  float step, least;

  KERNELS_FN static Steps of(float smallest, float greatest) {
    const uint16_t zero = to_half(smallest);
    const float span = greatest - from_half(zero);
    // below 0 where equal entries lie under their rounded least
    const uint16_t scale = to_half((span > 0 ? span : 0) / 15);
    const float step = from_half(scale);
    return {scale, zero, step > 0 ? step : 1, from_half(zero)};
  }
  KERNELS_FN uint8_t code(float value) const {
    const float place = rintf((value - least) / step);
    return uint8_t(place < 0 ? 0 : place > 15 ? 15 : place);
  }
};

// A number again; the product is exact in float32, so fusing it changes nothing.
KERNELS_FN float from_int4(uint32_t code, float scale, float zero) { return fmaf(float(code), scale, zero); }

}  // namespace kernels
