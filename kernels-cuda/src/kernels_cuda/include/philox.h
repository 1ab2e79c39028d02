// Philox4x32-10: four random words for a counter of four and a key of two (Salmon et al., SC 2011). The layout is that of every
// random number here: key = the halves of the seed, low first; counter = (index low, index high, element / 4, stream number);
// element e is word e % 4.
#pragma once
#include "floats.h"

namespace kernels {

struct Random {
  uint32_t key[2], index[2], stream;

  Random() = default;
  KERNELS_FN Random(int64_t seed, int64_t number, uint32_t stream)
      : key{uint32_t(seed), uint32_t(uint64_t(seed) >> 32)}, index{uint32_t(number), uint32_t(uint64_t(number) >> 32)}, stream(stream) {}

  // The words of elements 4 block to 4 block + 3.
  KERNELS_FN void words(uint32_t block, uint32_t* found) const {
    uint32_t a = index[0], b = index[1], c = block, d = stream, k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round) {
      const uint64_t first = uint64_t(0xD2511F53u) * a, second = uint64_t(0xCD9E8D57u) * c;
      a = uint32_t(second >> 32) ^ b ^ k0;
      c = uint32_t(first >> 32) ^ d ^ k1;
      b = uint32_t(second);
      d = uint32_t(first);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    found[0] = a;
    found[1] = b;
    found[2] = c;
    found[3] = d;
  }
};

// A float as one of its two bfloat16 neighbours, the upper one with the probability of the distance from the lower: 16 random bits are
// added to those that go. Infinite and NaN stay.
KERNELS_FN uint16_t rounded_at_random(float value, uint16_t random) {
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffffu;
  const uint32_t up = size < 0x7f800000u ? random : 0u, quiet = size > 0x7f800000u ? 0x400000u : 0u;
  return uint16_t(((bits + up) | quiet) >> 16);
}

}  // namespace kernels
