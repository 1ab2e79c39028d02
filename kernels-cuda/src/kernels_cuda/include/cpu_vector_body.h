// Vectors of KERNELS_VECTOR_BYTES bytes. Included inside a namespace by cpu_vector.h and, once per instruction set, by cpu_levels.h.
constexpr int64_t lanes = KERNELS_VECTOR_BYTES / 4;
typedef float floats __attribute__((vector_size(KERNELS_VECTOR_BYTES)));
typedef uint32_t words __attribute__((vector_size(KERNELS_VECTOR_BYTES)));
typedef int32_t integers __attribute__((vector_size(KERNELS_VECTOR_BYTES)));
typedef uint16_t halves __attribute__((vector_size(KERNELS_VECTOR_BYTES / 2)));

// subtracting zero changes nothing, so it costs nothing (adding it would turn -0 into 0)
inline floats splat(float value) { return value - floats{}; }

inline floats load(const float* from) {
  floats value;
  memcpy(&value, from, sizeof value);
  return value;
}

inline floats load(const bfloat16* from) {
  halves bits;
  memcpy(&bits, from, sizeof bits);
  return (floats)(__builtin_convertvector(bits, words) << 16);
}

inline void store(float* to, floats value) { memcpy(to, &value, sizeof value); }

// Rounds to nearest even; a NaN stays one.
inline void store(bfloat16* to, floats value) {
  const words bits = (words)value;
  const words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const words quiet = bits >> 16 | 0x40;
  const halves result = __builtin_convertvector((words)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded), halves);
  memcpy(to, &result, sizeof result);
}

// The last `count` < 16 values of a row, the missing ones replaced by `fill`.
template <class T>
inline floats load_tail(const T* from, int64_t count, float fill) {
  floats value = splat(fill);
  for (int64_t lane = 0; lane < count; ++lane) value[lane] = widen(from[lane]);
  return value;
}

template <class T>
inline void store_tail(T* to, floats value, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = narrow<T>(value[lane]);
}

inline floats larger(floats a, floats b) { return a > b ? a : b; }

// In a fixed order, so that a sum has the same bits everywhere.
inline float largest(floats value) {
  float result = value[0];
  for (int lane = 1; lane < lanes; ++lane) result = value[lane] > result ? value[lane] : result;
  return result;
}

inline double sum(floats value) {
  double result = 0;
  for (int lane = 0; lane < lanes; ++lane) result += value[lane];
  return result;
}

// e^x for x <= 88, relative error below 2e-7: x = n ln 2 + r with |r| <= ln 2 / 2, then Taylor's series of
// degree 7 in r (its remainder is below 6e-9). Zero below -87; NaN stays NaN.
inline floats exponential(floats x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x / ln 2) in the low bits
  const floats safe = x < -87.0f ? splat(-87.0f) : x;
  const floats shifted = safe * 1.44269504088896341f + shift;
  const floats n = shifted - shift;
  // ln 2 in two parts: n times the first is exact
  const floats r = (safe - n * 0.693359375f) + n * 2.12194440e-4f;
  floats series = splat(1.0f / 5040);
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const words power = ((words)shifted - bits_of(shift) + 127) << 23;
  return x < -87.0f ? splat(0.0f) : series * (floats)power;
}

// Any lanes of two vectors; lanes of the second have numbers from `lanes` on.
#ifdef __clang__
#define KERNELS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KERNELS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, integers{__VA_ARGS__})
#endif

// a0 + a1, a2 + a3, ..., b0 + b1, ...
template <int... I>
inline floats add_neighbours(floats a, floats b, std::integer_sequence<int, I...>) {
  return KERNELS_SHUFFLE(a, b, (2 * I)...) + KERNELS_SHUFFLE(a, b, (2 * I + 1)...);
}

// a0 b0 a1 b1 ...: the first or the second half of it.
template <int half, int... I>
inline floats zip(floats a, floats b, std::integer_sequence<int, I...>) {
  return KERNELS_SHUFFLE(a, b, (half * int(lanes) / 2 + I / 2 + I % 2 * int(lanes))...);
}
#undef KERNELS_SHUFFLE

using each_lane = std::make_integer_sequence<int, int(lanes)>;

// The sum of each of `count` vectors (a power of two, at most `lanes`) in the first lanes of the result.
template <int count>
inline floats sums(floats* values) {
  static_assert(count <= lanes, "one lane for each sum");
#pragma GCC unroll 16
  for (int left = count; left > 1; left /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < left / 2; ++i) values[i] = add_neighbours(values[2 * i], values[2 * i + 1], each_lane{});
  }
  floats result = values[0];
#pragma GCC unroll 16
  for (int left = int(lanes) / count; left > 1; left /= 2) result = add_neighbours(result, result, each_lane{});
  return result;
}

// to[j][i] = from[i][j] for size x size floats; size is a multiple of `lanes`.
inline void transpose(float* to, const float* from, int64_t size) {
  for (int64_t i = 0; i < size; i += lanes) {
    for (int64_t j = 0; j < size; j += lanes) {
      floats rows[lanes], other[lanes];
      for (int n = 0; n < lanes; ++n) rows[n] = load(from + (i + n) * size + j);
      // each round rotates the bits of (row, lane) by one
      for (int64_t round = 1; round < lanes; round *= 2) {
        for (int n = 0; n < lanes / 2; ++n) {
          other[2 * n] = zip<0>(rows[n], rows[n + lanes / 2], each_lane{});
          other[2 * n + 1] = zip<1>(rows[n], rows[n + lanes / 2], each_lane{});
        }
        for (int n = 0; n < lanes; ++n) rows[n] = other[n];
      }
      for (int n = 0; n < lanes; ++n) store(to + (j + n) * size + i, rows[n]);
    }
  }
}
