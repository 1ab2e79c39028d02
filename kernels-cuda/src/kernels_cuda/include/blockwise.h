// Numbers kept as 8-bit codes: a block of values is divided by its largest magnitude, and each quotient is replaced by the nearest
// of 256 sorted values, the code book. What CPU twins and CUDA kernels share; every result is the same bit for bit.
#pragma once
#include <math.h>

#include "floats.h"

namespace kernels {

// A tensor cut into blocks that restart at every row; a flat tensor is one row.
struct Blocks {
  int64_t rows, columns, block;
  KERNELS_FN int64_t per_row() const { return (columns + block - 1) / block; }
  KERNELS_FN int64_t count() const { return rows * per_row(); }
  KERNELS_FN int64_t begin(int64_t number) const { return number / per_row() * columns + number % per_row() * block; }
  KERNELS_FN int64_t size(int64_t number) const {
    const int64_t rest = columns - number % per_row() * block;
    return rest < block ? rest : block;
  }
};

// The largest float not above the middle of two: a quotient takes the upper code only if it is above this.
KERNELS_FN float bound_between(float lower, float upper) {
  const double middle = (double(lower) + double(upper)) / 2;
  const float bound = float(middle);
  return double(bound) > middle ? nextafterf(bound, -INFINITY) : bound;
}

// Quotients are sorted into cells by their upper 16 bits, of which the ones below 2^-25 are not told apart.
constexpr int num_octaves = 26;
constexpr uint32_t last_cell = (num_octaves - 1) << 7;

// Octave and leading 7 bits of a magnitude, from 0 to last_cell; NaN is last.
KERNELS_FN uint32_t magnitude_of(uint32_t bits) {
  constexpr uint32_t lowest = (127 - (num_octaves - 1)) << 7;
  const uint32_t upper = (bits & 0x7fffffffu) >> 16;
  const uint32_t above = upper < lowest ? 0 : upper - lowest;
  return above < last_cell ? above : last_cell;
}

// A block whose largest magnitude is infinite or NaN has no codes: all are 0, and the maximum tells.
KERNELS_FN bool is_finite_bits(uint32_t magnitude_bits) { return magnitude_bits < 0x7f800000u; }

// One step of Adam. Products that are summed are fused explicitly, so that no compiler chooses.
struct Adam {
  float b1, rest1, b2, rest2, correction1, correction2, eps;
  float decay, alpha;  // out <- decay out - alpha N

  Adam(double b1, double b2, double eps, int64_t step, double decay, double alpha)
      : b1(float(b1)),
        rest1(float(1 - b1)),
        b2(float(b2)),
        rest2(float(1 - b2)),
        correction1(float(1 / (1 - pow(b1, double(step))))),
        correction2(float(1 / (1 - pow(b2, double(step))))),
        eps(float(eps)),
        decay(float(decay)),
        alpha(float(alpha)) {}

  KERNELS_FN float first(float m, float g) const { return fmaf(b1, m, rest1 * g); }
  KERNELS_FN float second(float v, float g) const { return fmaf(b2, v, rest2 * g * g); }
  KERNELS_FN float normalised(float m, float v) const { return m * correction1 / (sqrtf(v * correction2) + eps); }
  // without decay `out` is not read: it may hold anything
  KERNELS_FN float written(float out, float n) const { return decay == 0 ? -alpha * n : fmaf(-alpha, n, decay * out); }
};

}  // namespace kernels
