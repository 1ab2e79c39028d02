// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include <math.h>

#include "../../include/philox.h"

namespace kernels {

constexpr uint32_t projection_stream = 12;  // in the one list of streams

// ln(n / 2^24) for 1 <= n <= 2^24, exact to 1e-10 of itself: n = 2^exponent m with m from sqrt(1/2) to sqrt(2), and the series of
// ln m = 2 artanh((m - 1) / (m + 1)).
KERNELS_FN double log_of_fraction(double n) {
  int64_t bits;
  memcpy(&bits, &n, sizeof bits);
  // so that the exponent's field changes at sqrt(2) instead of 2
  const int64_t shifted = bits + 0x95F619980C433;
  const int64_t exponent = (shifted >> 52) - 1023;
  const int64_t kept = bits - (exponent << 52);
  double m;
  memcpy(&m, &kept, sizeof m);
  const double s = (m - 1) / (m + 1), z = s * s;
  const double series = 2 + z * (2.0 / 3 + z * (2.0 / 5 + z * (2.0 / 7 + z * (2.0 / 9 + z * (2.0 / 11 + z * (2.0 / 13))))));
  return s * series + double(exponent - 24) * 0.69314718055994530942;
}

// Two normals from two words (Box-Muller). Sine and cosine are series from the nearest quarter of a turn, exact to 1e-11: plain
// products and sums, which compilers put into vectors and which are the same everywhere up to a fused rounding of float64.
KERNELS_FN void normals_of(uint32_t first, uint32_t second, float* one, float* other) {
  const double radius = sqrt(-2 * log_of_fraction(double(int32_t(first >> 8) + 1)));
  const int32_t angle = int32_t(second >> 8), quarter = (angle + (1 << 21)) >> 22;
  const double x = double(angle - quarter * (1 << 22)) * (6.283185307179586477 / 16777216), z = x * x;
  const double sine = x * (1 - z / 6 * (1 - z / 20 * (1 - z / 42 * (1 - z / 72 * (1 - z / 110)))));
  const double cosine = 1 - z / 2 * (1 - z / 12 * (1 - z / 30 * (1 - z / 56 * (1 - z / 90 * (1 - z / 132)))));
  const bool odd = quarter & 1;
  const double across = odd ? sine : cosine, up = odd ? cosine : sine;
  *one = float((quarter + 1) & 2 ? -radius * across : radius * across);
  *other = float(quarter & 2 ? -radius * up : radius * up);
}

// out[count] <- standard normals
void gaussian(float* out, int64_t count, Random random, void* stream);

}  // namespace kernels
