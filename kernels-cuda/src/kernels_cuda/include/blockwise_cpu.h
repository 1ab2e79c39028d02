// Blocks of codes on the CPU: AVX-512 with byte permutations, AVX2 or plain code, chosen when the library runs.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "blockwise.h"

// KERNELS_PLAIN leaves out what the compiler's flags do not name, so that tests reach the plain code.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(KERNELS_PLAIN)
#include <immintrin.h>
#define KERNELS_BYTE_PERMUTATIONS
#define KERNELS_PERMUTING __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma")))
#if !defined(__clang__) && __GNUC__ >= 12 && !defined(__AVX2__)
#define KERNELS_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
#endif
#ifndef KERNELS_CLONES
#define KERNELS_CLONES
#endif

namespace kernels {

// A code book ready for use. Every octave of magnitudes is cut into as many equal cells as it takes for a cell to hold at most
// one bound; so the cell and one comparison give the code. 512 cells serve the usual books; for others, with more bounds in a
// cell, the comparison is repeated.
struct Book {
  static constexpr int num_cells = 512;
  alignas(64) uint16_t first_cell[64] = {};  // by sign and octave
  alignas(64) uint16_t shift[64] = {};
  alignas(64) uint8_t lowest[num_cells] = {};  // number of bounds below all quotients of the cell
  alignas(64) float value[256];
  alignas(64) float bound[256];
  // the same by byte, for permutations
  alignas(64) uint8_t value_bytes[4][256];
  alignas(64) uint8_t bound_bytes[4][256];
  bool one_comparison = true;

  explicit Book(const float* code) {
    std::memcpy(value, code, sizeof value);
    for (int i = 0; i < 255; ++i) bound[i] = bound_between(code[i], code[i + 1]);
    bound[255] = std::numeric_limits<float>::infinity();
    find_shifts();
    while (!divide()) coarsen();
    count_bounds();
    split(value, value_bytes);
    split(bound, bound_bytes);
  }

  int cell_of(float quotient) const {
    const uint32_t bits = bits_of(quotient), magnitude = magnitude_of(bits), octave = (magnitude >> 7) | bits >> 31 << 5;
    return first_cell[octave] + ((magnitude & 127) >> shift[octave]);
  }

  uint8_t nearest(float quotient) const {
    int code = lowest[cell_of(quotient)];
    while (quotient > bound[code]) ++code;
    return uint8_t(code);
  }

 private:
  // The largest cells that tell the bounds of an octave apart.
  void find_shifts() {
    std::fill_n(shift, 64, uint16_t(7));
    for (int i = 0; i < 254; ++i) {
      const int octave = octave_of(bound[i]);
      if (octave != octave_of(bound[i + 1])) continue;
      const uint32_t different = magnitude_of(bits_of(bound[i])) ^ magnitude_of(bits_of(bound[i + 1]));
      const int highest = different ? 31 - __builtin_clz(different) : 0;
      shift[octave] = std::min(shift[octave], uint16_t(highest));
      if (!different) one_comparison = false;
    }
  }

  void coarsen() {
    for (uint16_t& each : shift) each = std::min(uint16_t(each + 1), uint16_t(7));
    one_comparison = false;
  }

  static int octave_of(float quotient) { return int(magnitude_of(bits_of(quotient)) >> 7 | bits_of(quotient) >> 31 << 5); }

  // the last octave has one number, 1
  int size(int octave) const { return octave % 32 + 1 < num_octaves ? 128 >> shift[octave] : 1; }

  // False if there is no room.
  bool divide() {
    int next = 0;
    for (int octave = 0; octave < 64; ++octave) {
      if (octave % 32 >= num_octaves) continue;
      first_cell[octave] = uint16_t(next);
      next += size(octave);
    }
    return next <= num_cells;
  }

  // A cell starts with the bounds that lie in cells of lower quotients.
  void count_bounds() {
    uint8_t below[num_cells + 1] = {};
    for (int i = 0; i < 255; ++i) ++below[cell_of(bound[i])];
    int total = 0;
    const auto visit = [&](int cell) {
      lowest[cell] = uint8_t(total);
      total += below[cell];
    };
    for (int octave = num_octaves - 1; octave >= 0; --octave)
      for (int cell = size(octave | 32) - 1; cell >= 0; --cell) visit(first_cell[octave | 32] + cell);
    for (int octave = 0; octave < num_octaves; ++octave)
      for (int cell = 0; cell < size(octave); ++cell) visit(first_cell[octave] + cell);
  }

  static void split(const float* values, uint8_t (*bytes)[256]) {
    for (int i = 0; i < 256; ++i)
      for (int byte = 0; byte < 4; ++byte) bytes[byte][i] = uint8_t(bits_of(values[i]) >> 8 * byte);
  }
};

#ifdef KERNELS_BYTE_PERMUTATIONS
inline bool permutes_bytes() {
  static const bool has = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}

// 64 codes looked up in a table of 256 floats that lies in 16 registers, four for each byte of the floats.
struct Permuted {
  __m512i table[16];

  KERNELS_PERMUTING explicit Permuted(const uint8_t (*bytes)[256]) {
    for (int i = 0; i < 16; ++i) table[i] = _mm512_load_si512(&bytes[i / 4][i % 4 * 64]);
  }

  KERNELS_PERMUTING void look_up(__m512i codes, __m512* found) const {
    // The unpacking below works inside quarters of a register, so codes are dealt to quarters in fours first.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    codes = _mm512_permutexvar_epi32(order, codes);
    const __mmask64 upper_half = _mm512_movepi8_mask(codes);
    __m512i byte[4];
    for (int i = 0; i < 4; ++i) {
      const __m512i lower = _mm512_permutex2var_epi8(table[4 * i], codes, table[4 * i + 1]);
      const __m512i upper = _mm512_permutex2var_epi8(table[4 * i + 2], codes, table[4 * i + 3]);
      byte[i] = _mm512_mask_blend_epi8(upper_half, lower, upper);
    }
    const __m512i even_low = _mm512_unpacklo_epi8(byte[0], byte[1]), even_high = _mm512_unpackhi_epi8(byte[0], byte[1]);
    const __m512i odd_low = _mm512_unpacklo_epi8(byte[2], byte[3]), odd_high = _mm512_unpackhi_epi8(byte[2], byte[3]);
    found[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even_low, odd_low));
    found[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even_low, odd_low));
    found[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even_high, odd_high));
    found[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even_high, odd_high));
  }
};

// These three take a multiple of 64 values and give the number done.
KERNELS_PERMUTING inline int64_t dequantize_permuting(const Book& book, const uint8_t* codes, float absmax, int64_t count, float* to) {
  const Permuted values(book.value_bytes);
  const __m512 scale = _mm512_set1_ps(absmax);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __m512 found[4];
    values.look_up(_mm512_loadu_si512(codes + i), found);
    for (int part = 0; part < 4; ++part) _mm512_storeu_ps(to + i + 16 * part, _mm512_mul_ps(found[part], scale));
  }
  return i;
}

// Cells (16 bits each) of 32 quotients.
KERNELS_PERMUTING inline __m512i cells_of(const Book& book, __m512 first, __m512 second) {
  const __m512i odd_words = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17,
                                             15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i bits = _mm512_permutex2var_epi16(_mm512_castps_si512(first), odd_words, _mm512_castps_si512(second));
  const __m512i lowest = _mm512_set1_epi16((127 - (num_octaves - 1)) << 7);
  const __m512i above = _mm512_subs_epu16(_mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)), lowest);
  const __m512i magnitude = _mm512_min_epu16(above, _mm512_set1_epi16(last_cell));
  const __m512i sign = _mm512_slli_epi16(_mm512_srli_epi16(bits, 15), 5);
  const __m512i octave = _mm512_or_si512(_mm512_srli_epi16(magnitude, 7), sign);
  const __m512i start = _mm512_permutex2var_epi16(_mm512_load_si512(book.first_cell), octave, _mm512_load_si512(book.first_cell + 32));
  const __m512i shift = _mm512_permutex2var_epi16(_mm512_load_si512(book.shift), octave, _mm512_load_si512(book.shift + 32));
  return _mm512_add_epi16(start, _mm512_srlv_epi16(_mm512_and_si512(magnitude, _mm512_set1_epi16(127)), shift));
}

KERNELS_PERMUTING inline int64_t quantize_permuting(const Book& book, const float* x, float divisor, int64_t count, bool nonzero,
                                                    uint8_t* codes) {
  const Permuted bounds(book.bound_bytes);
  const __m512 scale = _mm512_set1_ps(divisor);
  __m512i lowest[8];
  for (int i = 0; i < 8; ++i) lowest[i] = _mm512_load_si512(book.lowest + 64 * i);
  alignas(64) uint8_t even[64];
  for (int i = 0; i < 64; ++i) even[i] = uint8_t(2 * i);
  const __m512i even_bytes = _mm512_load_si512(even), ones = _mm512_set1_epi8(1);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __m512 quotient[4], bound[4];
    __mmask64 positive = 0, above = 0;
    for (int part = 0; part < 4; ++part) {
      const __m512 value = _mm512_loadu_ps(x + i + 16 * part);
      quotient[part] = _mm512_div_ps(value, scale);
      positive |= __mmask64(_mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GT_OQ)) << 16 * part;
    }
    const __m512i first = cells_of(book, quotient[0], quotient[1]), second = cells_of(book, quotient[2], quotient[3]);
    const __m512i cell = _mm512_permutex2var_epi8(first, even_bytes, second);
    const __mmask64 bit7 = _mm512_movepi8_mask(cell);
    const __m512i bit8 = _mm512_set1_epi16(0x100);
    const __mmask64 last = __mmask64(_mm512_test_epi16_mask(second, bit8)) << 32 | _mm512_test_epi16_mask(first, bit8);
    __m512i quarter[4];
    for (int part = 0; part < 4; ++part) quarter[part] = _mm512_permutex2var_epi8(lowest[2 * part], cell, lowest[2 * part + 1]);
    __m512i code = _mm512_mask_blend_epi8(last, _mm512_mask_blend_epi8(bit7, quarter[0], quarter[1]),
                                          _mm512_mask_blend_epi8(bit7, quarter[2], quarter[3]));
    bounds.look_up(code, bound);
    for (int part = 0; part < 4; ++part) above |= __mmask64(_mm512_cmp_ps_mask(quotient[part], bound[part], _CMP_GT_OQ)) << 16 * part;
    code = _mm512_mask_add_epi8(code, above, code, ones);
    if (nonzero) code = _mm512_mask_max_epu8(code, positive, code, ones);
    _mm512_storeu_si512(codes + i, code);
  }
  return i;
}
#endif

KERNELS_CLONES static void dequantize_values(const Book& book, const uint8_t* codes, float absmax, int64_t count, float* to) {
  int64_t i = 0;
#ifdef KERNELS_BYTE_PERMUTATIONS
  if (permutes_bytes()) i = dequantize_permuting(book, codes, absmax, count, to);
#endif
  for (; i < count; ++i) to[i] = book.value[codes[i]] * absmax;
}

// Bits of the largest magnitude; as a number that of NaN is the largest of all.
KERNELS_CLONES static uint32_t largest_bits(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, bits_of(x[i]) & 0x7fffffffu);
  return largest;
}

// One block; returns its largest magnitude. `nonzero`: a value above 0 never takes code 0.
KERNELS_CLONES static float quantize_values(const Book& book, const float* x, int64_t count, bool nonzero, uint8_t* codes) {
  const uint32_t largest = largest_bits(x, count);
  const float absmax = float_of(largest), divisor = largest ? absmax : 1;
  if (!is_finite_bits(largest)) {
    std::memset(codes, 0, size_t(count));
    return absmax;
  }
  int64_t i = 0;
#ifdef KERNELS_BYTE_PERMUTATIONS
  if (permutes_bytes() && book.one_comparison) i = quantize_permuting(book, x, divisor, count, nonzero, codes);
#endif
  for (; i < count; ++i) {
    const uint8_t code = book.nearest(x[i] / divisor);
    codes[i] = nonzero && code == 0 && x[i] > 0 ? 1 : code;
  }
  return absmax;
}

KERNELS_CLONES static void adam_values(const Adam& adam, const float* __restrict gradient, float* __restrict first,
                                       float* __restrict second, int64_t count, float* __restrict out) {
  const Adam by = adam;
  // two loops, since a choice inside would make a blend and read `out` in vain
  if (by.decay == 0) {
    for (int64_t i = 0; i < count; ++i) {
      const float m = first[i] = by.first(first[i], gradient[i]), v = second[i] = by.second(second[i], gradient[i]);
      out[i] = -by.alpha * by.normalised(m, v);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const float m = first[i] = by.first(first[i], gradient[i]), v = second[i] = by.second(second[i], gradient[i]);
      out[i] = by.written(out[i], by.normalised(m, v));
    }
  }
}

}  // namespace kernels
