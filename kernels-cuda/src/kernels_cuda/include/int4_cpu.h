// Numbers in 4 bits on the CPU.
#pragma once
#include <algorithm>

#include "int4.h"

namespace kernels {

// A tensor in 4 bits, seen flat.
struct Packed {
  const uint8_t* codes;
  const uint16_t *scale, *zero;

  // Numbers `begin` to `end`, to out[0] and on.
  void unpack(int64_t begin, int64_t end, float* out) const {
    for (int64_t at = begin; at < end;) {
      const int64_t group = at / int4_group, stop = std::min(end, (group + 1) * int4_group);
      const float step = from_half(scale[group]), least = from_half(zero[group]);
      if (at % 2) {
        *out++ = from_int4(codes[at / 2] >> 4, step, least);
        ++at;
      }
      const uint8_t* pairs = codes + at / 2;
      const int64_t count = (stop - at) / 2;
      for (int64_t i = 0; i < count; ++i) {
        out[2 * i] = from_int4(pairs[i] & 15, step, least);
        out[2 * i + 1] = from_int4(pairs[i] >> 4, step, least);
      }
      out += 2 * count;
      at += 2 * count;
      if (at < stop) {
        *out++ = from_int4(codes[at / 2] & 15, step, least);
        ++at;
      }
    }
  }
};

}  // namespace kernels
