// Rows of logits on the CPU: their log-sums and exponentials, 16 values at a time. float64 serves gradcheck and takes one at a time.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu_vector.h"

namespace kernels {

// Values that are read for their maximum and, still in the first-level cache, for their sum.
constexpr int64_t block_values = 2048;

template <class T>
using Lanes = std::conditional_t<std::is_same_v<T, double>, double, floats>;
template <class T>
constexpr int64_t num_lanes = std::is_same_v<T, double> ? 1 : lanes;

inline double load(const double* from) { return *from; }
inline void store(double* to, double value) { *to = value; }
inline double exponential(double x) { return std::exp(x); }
inline double larger(double a, double b) { return a > b ? a : b; }
inline double largest(double value) { return value; }
inline double sum(double value) { return value; }

// The same value in every lane; subtracting zero changes nothing.
template <class T>
inline Lanes<T> filled(Wide<T> value) {
  return value - Lanes<T>{};
}

// Calls visit(first index, how many values from there on exist, at most num_lanes).
template <class T, class Visit>
inline void each_lanes(int64_t begin, int64_t end, Visit visit) {
  int64_t i = begin;
  for (; i + num_lanes<T> <= end; i += num_lanes<T>) visit(i, num_lanes<T>);
  if (i < end) visit(i, end - i);
}

template <class T>
inline Lanes<T> get(const T* from, int64_t present, Wide<T> fill) {
  if constexpr (num_lanes<T> > 1)
    if (present < num_lanes<T>) return load_tail(from, present, fill);
  return load(from);
}

template <class T>
inline void put(T* to, Lanes<T> value, int64_t present) {
  if constexpr (num_lanes<T> > 1)
    if (present < num_lanes<T>) return store_tail(to, value, present);
  store(to, value);
}

// The maximum (at least the lowest finite number, so that a row of -infinity sums to zero) and the sum of exp(x - maximum).
template <class T>
struct LogSum {
  Wide<T> maximum = std::numeric_limits<float>::lowest();
  double total = 0;

  double value() const { return double(maximum) + std::log(total); }
  // The maximum rises, so what was summed before shrinks; returns by how much.
  double raise(Wide<T> to) {
    const double factor = std::exp(double(maximum) - to);
    maximum = to;
    total *= factor;
    return factor;
  }
};

template <class T>
LogSum<T> log_sum_of(const T* row, int64_t count) {
  LogSum<T> known;
  const Wide<T> fill = -std::numeric_limits<Wide<T>>::infinity();
  for (int64_t begin = 0; begin < count; begin += block_values) {
    const int64_t end = std::min(begin + block_values, count);
    Lanes<T> maximum = filled<T>(known.maximum), total = filled<T>(0);
    each_lanes<T>(begin, end, [&](int64_t i, int64_t present) { maximum = larger(get(row + i, present, fill), maximum); });
    known.raise(largest(maximum));
    each_lanes<T>(begin, end, [&](int64_t i, int64_t present) { total += exponential(get(row + i, present, fill) - known.maximum); });
    known.total += sum(total);
  }
  return known;
}

// row = scale * exp(row - maximum)
template <class T>
void scale_exponentials(T* row, int64_t count, Wide<T> maximum, Wide<T> scale) {
  each_lanes<T>(0, count, [&](int64_t i, int64_t present) {
    put(row + i, exponential(get(row + i, present, Wide<T>(0)) - maximum) * scale, present);
  });
}

}  // namespace kernels
