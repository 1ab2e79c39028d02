// Products of a thin matrix with a wide one on AVX-512, for CPUs: what lies in memory as float32 or bfloat16 is packed, part by part, into
// words of 32 bits that stay in the cache (one float, or two bfloat16 numbers that follow one another in a sum), so that neither a
// transposed nor a converted copy of a whole gradient exists. Sums are float32, in an order that depends on the sizes alone.
#pragma once
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define KERNELS_HAVE_PRODUCT 1
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "floats.h"

namespace kernels {

#ifdef __AVX512BF16__
constexpr bool have_halves = true;
#else
constexpr bool have_halves = false;
#endif

// A tile has 8 rows of 3 vectors: 24 of the 32 registers hold its sums. 2048 words of its columns stay in the second cache; a longer sum is
// taken in parts. What is used again by other tiles is cut to about `cached` words.
constexpr int lane = 16, tile_rows = 8, tile_vectors = 3, tile_columns = tile_vectors * lane;
constexpr int64_t most_words = 2048, cached = 65536;

// Element (x, p) of a factor: x counts rows of the left one or columns of the right one, p goes along the sum. One stride is 1.
struct Factor {
  const void* data;
  Float type;
  int64_t stride;  // of the index whose stride is not 1
  bool along;      // p has stride 1
  int64_t size, length;
};

struct Free {
  void operator()(float* pointer) const { free(pointer); }
};
using Buffer = std::unique_ptr<float, Free>;

inline Buffer buffer(int64_t words) { return Buffer(static_cast<float*>(aligned_alloc(64, (words * 4 + 63) / 64 * 64))); }

inline int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

inline __mmask16 first_lanes(int64_t count) { return count >= lane ? 0xFFFF : count <= 0 ? 0 : __mmask16((1u << count) - 1); }

template <class T>
__m512 load_wide(const T* from, __mmask16 mask) {
  if constexpr (sizeof(T) == 4)
    return _mm512_maskz_loadu_ps(mask, from);
  else
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

// 32 bfloat16 numbers, those of `low` first.
template <class T>
__m512i load_halves(const T* low, __mmask16 low_mask, const T* high, __mmask16 high_mask) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 4)
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high_mask, high), _mm512_maskz_loadu_ps(low_mask, low));
#endif
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(low_mask, low)), _mm256_maskz_loadu_epi16(high_mask, high), 1);
}

// Words p .. p + 16 of one row or column whose sum goes along memory.
template <class T, bool halves>
__m512i words_along(const T* from, int64_t word, int64_t length) {
  if constexpr (!halves) return _mm512_castps_si512(load_wide(from + word, first_lanes(length - word)));
  const T* at = from + 2 * word;
  return load_halves(at, first_lanes(length - 2 * word), at + lane, first_lanes(length - 2 * word - lane));
}

// Word p of 16 rows or columns that lie side by side in memory.
template <class T, bool halves>
__m512i words_across(const T* from, int64_t stride, int64_t word, int64_t length, __mmask16 mask) {
  if constexpr (!halves) return _mm512_castps_si512(load_wide(from + word * stride, mask));
  alignas(64) static constexpr uint16_t pairs[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const T* at = from + 2 * word * stride;
  const __mmask16 second = 2 * word + 1 == length ? __mmask16(0) : mask;
  return _mm512_permutexvar_epi16(_mm512_load_si512(pairs), load_halves(at, mask, at + stride, second));
}

inline void transpose(__m512i* rows) {
  __m512i t[lane];
  for (int i = 0; i < lane; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < lane; i += 4)
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int i = 0; i < lane; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    rows[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// Panels of `width` rows or columns from `first` to `last`, each [end - begin][width]: words `begin` .. `end`; zeros where there are none.
template <class T, bool halves>
void pack_along(const Factor& from, int64_t first, int64_t last, int width, int64_t begin, int64_t end, float* out) {
  constexpr int64_t step = halves ? 2 : 1;
  const T* data = static_cast<const T*>(from.data);
  for (int64_t panel = first; panel < last; panel += width, out += (end - begin) * width)
    for (int at = 0; at < width; at += lane) {
      const int64_t x = panel + at;
      const __mmask16 kept = first_lanes(width - at), mask = first_lanes(from.size - x) & kept;
      for (int64_t word = begin; word < end; word += lane) {
        __m512i rows[lane];
        // the next 16 rows, at the pace of these: 16 at once are more than the processor foresees
        for (int i = lane; i < 2 * lane; ++i)
          for (int line = 0; line < step * lane; line += 64 / int(sizeof(T)))
            __builtin_prefetch(data + (x + i) * from.stride + step * word + line, 0, 2);
        for (int i = 0; i < lane; ++i)
          rows[i] = mask >> i & 1 ? words_along<T, halves>(data + (x + i) * from.stride, word, from.length) : _mm512_setzero_si512();
        transpose(rows);
        for (int i = 0; i < std::min<int64_t>(lane, end - word); ++i)
          _mm512_mask_storeu_epi32(out + (word - begin + i) * width + at, kept, rows[i]);
      }
    }
}

// The same where the panels' rows or columns lie side by side: all panels of a word at once, as memory has them.
template <class T, bool halves>
void pack_across(const Factor& from, int64_t first, int64_t last, int width, int64_t begin, int64_t end, float* out) {
  constexpr int64_t step = halves ? 2 : 1;
  const T* data = static_cast<const T*>(from.data);
  for (int64_t word = begin; word < end; ++word)
    for (int64_t panel = first; panel < last; panel += width)
      for (int at = 0; at < width; at += lane) {
        const int64_t x = panel + at;
        const __mmask16 kept = first_lanes(width - at), mask = first_lanes(from.size - x) & kept;
        // rows lie too far apart for the processor to foresee the next ones
        for (int64_t row = step * (word + 2); row < step * (word + 3); ++row) __builtin_prefetch(data + row * from.stride + x, 0, 3);
        _mm512_mask_storeu_epi32(out + (panel - first) * (end - begin) + (word - begin) * width + at, kept,
                                 words_across<T, halves>(data + x, from.stride, word, from.length, mask));
      }
}

template <bool halves>
void pack(const Factor& from, int64_t first, int64_t last, int width, int64_t begin, int64_t end, float* out) {
  const auto along = from.type == Float::float32 ? pack_along<float, halves> : pack_along<bfloat16, halves>;
  const auto across = from.type == Float::float32 ? pack_across<float, halves> : pack_across<bfloat16, halves>;
  (from.along ? along : across)(from, first, last, width, begin, end, out);
}

template <bool halves>
inline __m512 multiply_add(__m512 sum, __m512 a, __m512 b) {
#ifdef __AVX512BF16__
  if constexpr (halves) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
  return _mm512_fmadd_ps(a, b, sum);
}

// body(0), body(1), ... with constants: an array whose indices they are stays in registers. gcc 12 writes that of an unrolled loop to memory
// before and after the sum.
template <class Body, int... i>
[[gnu::always_inline]] inline void each(std::integer_sequence<int, i...>, const Body& body) {
  (body(std::integral_constant<int, i>{}), ...);
}
template <int count>
using First = std::make_integer_sequence<int, count>;

// out <- scale out + alpha sum; with scale 0 it may hold anything.
struct Scaled {
  float scale = 0, alpha = 1;
};

// Sums of a[words][8] b[words][48] to out[8][48]; only `rows` rows and `columns` columns are there.
template <bool halves, int vectors>
void tile(const float* a, const float* b, int64_t words, float* out, int64_t stride, int rows, __mmask16 last, Scaled by) {
  constexpr First<tile_rows> all_rows;
  constexpr First<vectors> all_vectors;
  // what the next tile on the right writes; in a lambda of its own, gcc 12 takes a prefetch for nothing
  for (int i = 0; i < tile_rows; ++i)
    for (int at = tile_columns; at < 2 * tile_columns; at += lane) __builtin_prefetch(out + i * stride + at, 1, 2);
  __m512 sum[tile_rows][vectors];
  each(all_rows, [&](auto i) { each(all_vectors, [&](auto v) { sum[i][v] = _mm512_setzero_ps(); }); });
  for (int64_t p = 0; p < words; ++p) {
    __m512 right[vectors];
    each(all_vectors, [&](auto v) { right[v] = _mm512_load_ps(b + p * tile_columns + v * lane); });
    each(all_rows, [&](auto i) {
      const __m512 left = _mm512_set1_ps(a[p * tile_rows + i]);
      each(all_vectors, [&](auto v) { sum[i][v] = multiply_add<halves>(sum[i][v], left, right[v]); });
    });
  }
  const __m512 scale = _mm512_set1_ps(by.scale), alpha = _mm512_set1_ps(by.alpha);
  each(all_rows, [&](auto i) {
    if (i >= rows) return;
    each(all_vectors, [&](auto v) {
      float* at = out + i * stride + v * lane;
      const __mmask16 mask = v == vectors - 1 ? last : __mmask16(0xFFFF);
      const __m512 value = by.scale == 0 ? _mm512_mul_ps(alpha, sum[i][v])
                                         : _mm512_fmadd_ps(alpha, sum[i][v], _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, at)));
      _mm512_mask_storeu_ps(at, mask, value);
    });
  });
}

// out[rows][columns] from packed rows times one packed panel of columns.
template <bool halves>
void tiles(const float* a, const float* b, int64_t words, float* out, int64_t stride, int64_t rows, int64_t columns, Scaled by) {
  const int vectors = int(pieces(columns, lane));
  const __mmask16 last = first_lanes(columns - (vectors - 1) * lane);
  const auto run = vectors == 1 ? tile<halves, 1> : vectors == 2 ? tile<halves, 2> : tile<halves, 3>;
  for (int64_t i = 0; i < rows; i += tile_rows)
    run(a + i * words, b, words, out + i * stride, stride, int(std::min<int64_t>(tile_rows, rows - i)), last, by);
}

// A sum's words, and how many of them are packed together.
template <bool halves>
struct Words {
  explicit Words(int64_t length) : all(halves ? (length + 1) / 2 : length), part(all ? pieces(all, pieces(all, most_words)) : 1) {}
  const int64_t all, part;
};

// out <- left right, or that added, where the right factor is the larger one: it is packed where it is used. `packed` holds the words of
// the left one as `thin_times_wide` packs them.
template <bool halves, class Parallel>
void packed_times_wide(const float* packed, int64_t left_size, const Factor& right, float* out, bool add, const Parallel& parallel) {
  const Words<halves> words(right.length);
  // columns that are packed together
  const int64_t span = std::clamp<int64_t>(3 * cached / 2 / (words.part * tile_columns), 1, 8) * tile_columns;
  const int64_t rows = pieces(left_size, tile_rows) * tile_rows;
  parallel(pieces(right.size, span), [&](int64_t from, int64_t to) {
    const Buffer panels = buffer(span * words.part);
    for (int64_t first = from * span; first < std::min(to * span, right.size); first += span) {
      const int64_t last = std::min(first + span, right.size);
      for (int64_t begin = 0; begin < words.all; begin += words.part) {
        const int64_t end = std::min(begin + words.part, words.all), size = end - begin;
        pack<halves>(right, first, last, tile_columns, begin, end, panels.get());
        for (int64_t column = first; column < last; column += tile_columns)
          tiles<halves>(packed + rows * begin, panels.get() + (column - first) * size, size, out + column, right.size, left_size,
                        std::min<int64_t>(tile_columns, last - column), {add || begin > 0 ? 1.0f : 0.0f});
      }
    }
  });
}

template <bool halves, class Parallel>
void thin_times_wide(const Factor& left, const Factor& right, float* out, bool add, const Parallel& parallel) {
  const Words<halves> words(left.length);
  const int64_t rows = pieces(left.size, tile_rows) * tile_rows;
  const Buffer packed = buffer(rows * words.all);
  for (int64_t begin = 0; begin < words.all; begin += words.part)
    pack<halves>(left, 0, rows, tile_rows, begin, std::min(begin + words.part, words.all), packed.get() + rows * begin);
  packed_times_wide<halves>(packed.get(), left.size, right, out, add, parallel);
}

// use(row, rows, values) for blocks of rows of left right, whose sums are short: values[rows][columns] stay in the cache, or are rows of
// `out`, where it is given, scaled and added as `by` says.
template <bool halves, class Parallel, class Use>
void rows_of_product(const Factor& left, const Factor& right, const Parallel& parallel, const Use& use, float* out = nullptr,
                     Scaled by = {}) {
  const Words<halves> words(left.length);
  const int64_t columns = pieces(right.size, tile_columns) * tile_columns;
  // columns of more words than the first cache holds come from a slower one for each block
  const int64_t most = out ? std::max<int64_t>(std::min(words.part, cached / words.part) / tile_rows, 8) * tile_rows
                           : std::clamp<int64_t>(cached / columns, 1, 8) * tile_rows;
  const Buffer packed = buffer(columns * words.all);
  for (int64_t begin = 0; begin < words.all; begin += words.part)
    pack<halves>(right, 0, columns, tile_columns, begin, std::min(begin + words.part, words.all), packed.get() + columns * begin);
  parallel(pieces(left.size, most), [&](int64_t from, int64_t to) {
    const Buffer own = buffer(most * words.part), sums = buffer(out ? 0 : most * right.size);
    for (int64_t row = from * most; row < std::min(to * most, left.size); row += most) {
      const int64_t rows = std::min(most, left.size - row);
      float* values = out ? out + row * right.size : sums.get();
      for (int64_t begin = 0; begin < words.all; begin += words.part) {
        const int64_t end = std::min(begin + words.part, words.all), size = end - begin;
        pack<halves>(left, row, row + rows, tile_rows, begin, end, own.get());
        for (int64_t column = 0; column < right.size; column += tile_columns)
          tiles<halves>(own.get(), packed.get() + columns * begin + column * size, size, values + column, right.size, rows,
                        std::min<int64_t>(tile_columns, right.size - column), {begin > 0 ? 1.0f : by.scale, by.alpha});
      }
      use(row, rows, values);
    }
  });
}

}  // namespace kernels
#endif
