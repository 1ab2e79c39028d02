// R rows of one chunk, V vocabulary; s and t are the logits of student and teacher over the temperature, q and p their softmax.
#include <type_traits>

#include "../../include/cuda_rows.h"
#include "op.h"

namespace kernels {
namespace {

// Of a part of a row: log-sums of both, and the sums of e^(s - maximum) (s - t) and of e^(t - maximum) (t - s).
template <class R>
struct PairSums {
  using Real = R;
  LogSum<Real> student, teacher;
  Real student_distance, teacher_distance;
};

template <class Real>
__device__ __forceinline__ PairSums<Real> joined(PairSums<Real> a, PairSums<Real> b) {
  const LogSum<Real> student = joined(a.student, b.student), teacher = joined(a.teacher, b.teacher);
  return {student, teacher,
          a.student_distance * exp(a.student.maximum - student.maximum) + b.student_distance * exp(b.student.maximum - student.maximum),
          a.teacher_distance * exp(a.teacher.maximum - teacher.maximum) + b.teacher_distance * exp(b.teacher.maximum - teacher.maximum)};
}

template <class R>
struct Sum {
  using Real = R;
  Real total;
};
template <class Real>
__device__ __forceinline__ Sum<Real> joined(Sum<Real> a, Sum<Real> b) {
  return {a.total + b.total};
}

template <class Real>
using BitsOf = std::conditional_t<std::is_same_v<Real, double>, uint64_t, uint32_t>;

// The number whose bits these are; more bits are more, for numbers that are not negative.
template <class Real>
__device__ __forceinline__ Real from_bits(BitsOf<Real> bits) {
  Real value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Real>
__device__ __forceinline__ BitsOf<Real> to_bits(Real value) {
  BitsOf<Real> bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// One row, by all threads of a block.
template <class T, class U>
struct Pair {
  using Real = Wide<T>;
  T* student;
  const U* teacher;
  int64_t count;
  Real scale;  // 1 / temperature
  PairSums<Real> sums;

  __device__ __forceinline__ Real s(int64_t i) const { return widen(student[i]) * scale; }
  __device__ __forceinline__ Real t(int64_t i) const { return Real(widen(teacher[i])) * scale; }
  __device__ __forceinline__ Real q(Real s) const { return exp(s - sums.student.maximum) / sums.student.total; }
  __device__ __forceinline__ Real p(Real t) const { return exp(t - sums.teacher.maximum) / sums.teacher.total; }

  // Reads both rows once.
  __device__ __forceinline__ void find_sums() {
    const LogSum<Real> nothing = {lowest<Real>, 0};
    const PairSums<Real> none = {nothing, nothing, 0, 0};
    PairSums<Real> mine = none;
    visit_row<false>(student, count, [&](Real* values, int64_t first, int size) {
      Real highest_s = mine.student.maximum, highest_t = mine.teacher.maximum;
      Real of_teacher[Pack<T>::size];
      for (int i = 0; i < size; ++i) {
        values[i] *= scale;
        of_teacher[i] = t(first + i);
        highest_s = values[i] > highest_s ? values[i] : highest_s;
        highest_t = of_teacher[i] > highest_t ? of_teacher[i] : highest_t;
      }
      const Real less_s = exp(mine.student.maximum - highest_s), less_t = exp(mine.teacher.maximum - highest_t);
      mine = {{highest_s, mine.student.total * less_s},
              {highest_t, mine.teacher.total * less_t},
              mine.student_distance * less_s,
              mine.teacher_distance * less_t};
      for (int i = 0; i < size; ++i) {
        const Real of_s = exp(values[i] - highest_s), of_t = exp(of_teacher[i] - highest_t), distance = of_teacher[i] - values[i];
        mine.student.total += of_s;
        mine.teacher.total += of_t;
        // what has no probability adds nothing, also where its logit is -infinity
        mine.student_distance -= of_s > 0 ? of_s * distance : 0;
        mine.teacher_distance += of_t > 0 ? of_t * distance : 0;
      }
    });
    sums = joined_by_block(mine, none);
  }

  __device__ __forceinline__ Real difference() const { return sums.student.value() - sums.teacher.value(); }
  __device__ __forceinline__ Real forward() const { return sums.teacher_distance / sums.teacher.total + difference(); }
  __device__ __forceinline__ Real reverse() const { return sums.student_distance / sums.student.total - difference(); }

  // The sum of value(i) over the row.
  template <class Value>
  __device__ __forceinline__ Real sum_of(Value value) const {
    Sum<Real> mine = {0};
    for (int64_t i = threadIdx.x; i < count; i += row_threads) mine.total += value(i);
    return joined_by_block(mine, Sum<Real>{0}).total;
  }

  // See the twin. The head set ends at the place `last` among those with its smallest probability.
  __device__ Real adaptive_weight() const {
    const auto p_of = [&](int64_t i) { return p(t(i)); };
    BitsOf<Real> low = 0, high = to_bits(Real(2));
    while (high - low > 1) {
      const BitsOf<Real> middle = low + (high - low) / 2;
      const Real least = from_bits<Real>(middle);
      const Real mass = sum_of([&](int64_t i) { return p_of(i) >= least ? p_of(i) : Real(0); });
      (mass >= Real(half_mass) ? low : high) = middle;
    }
    const Real least = from_bits<Real>(low);
    const Real missing = Real(half_mass) - sum_of([&](int64_t i) { return p_of(i) > least ? p_of(i) : Real(0); });
    const Real equals = sum_of([&](int64_t i) { return p_of(i) == least ? Real(1) : Real(0); });
    const Real needed = least > 0 && missing > 0 ? ceil(missing / least) : Real(1);
    int64_t before = -1, last = count - 1;
    if (needed < equals) {
      while (last - before > 1) {
        const int64_t middle = before + (last - before) / 2;
        const Real found = sum_of([&](int64_t i) { return i <= middle && p_of(i) == least ? Real(1) : Real(0); });
        (found >= needed ? last : before) = middle;
      }
    }
    const auto gap = [&](int64_t i, bool of_head) {
      const bool in_head = p_of(i) > least || (p_of(i) == least && i <= last);
      const Real difference = p_of(i) - q(s(i));
      return in_head == of_head ? (difference < 0 ? -difference : difference) : Real(0);
    };
    const Real of_head = sum_of([&](int64_t i) { return gap(i, true); }), of_tail = sum_of([&](int64_t i) { return gap(i, false); });
    return of_head + of_tail == 0 ? Real(0.5) : of_head / (of_head + of_tail);
  }
};

// Blocks per processor, told to the compiler, which would otherwise spill registers to fit more.
template <class T>
constexpr int blocks_at_once = std::is_same_v<T, double> ? 1 : 2;

// One block per row: both rows are read once for their sums, and once more (from L2) for the gradient.
template <class T, class U>
__global__ void __launch_bounds__(row_threads, blocks_at_once<T>) kl_gradient_kernel(KlRows in) {
  using Real = Wide<T>;
  const int64_t row = blockIdx.x;
  Pair<T, U> pair{static_cast<T*>(in.student) + row * in.vocabulary,
                  static_cast<const U*>(in.teacher) + row * in.teacher_stride,
                  in.vocabulary,
                  Real(1 / in.temperature),
                  {}};
  const bool counts = !in.mask || in.mask[row];
  const int64_t label = in.labels ? in.labels[row] : ignored_label;
  const bool labelled = label != ignored_label, valid = label >= 0 && label < in.vocabulary;
  const bool other_temperature = labelled && (!counts || in.temperature != 1);
  const Real* scales = static_cast<const Real*>(in.scales);
  // read before the barriers below: after them the gradient may stand there
  const Real label_logit = valid ? widen(pair.student[label]) : Real(NAN);
  const Real ce_scale = labelled ? (valid ? scales[1] : Real(NAN)) : Real(0);

  if (counts) pair.find_sums();
  const LogSum<Real> plain = other_temperature ? log_sum_of(pair.student, in.vocabulary) : pair.sums.student;
  Real weight = in.direction == Direction::forward ? 1 : 0;
  if (counts && in.direction == Direction::adaptive) weight = pair.adaptive_weight();
  Real kl = 0;
  if (counts) {
    // an infinite divergence of weight zero is none
    if (weight != 0) kl += weight * pair.forward();
    if (weight != 1) kl += (1 - weight) * pair.reverse();
  }
  if (threadIdx.x == 0) {
    static_cast<Real*>(in.kl)[row] = Real(in.temperature * in.temperature) * kl;
    static_cast<Real*>(in.ce)[row] = labelled ? log(plain.total) + (plain.maximum - label_logit) : Real(0);
  }
  if (!in.gradient) return;

  const Real factor = counts ? scales[0] * Real(in.temperature) : Real(0);
  const Real of_forward = factor * weight, of_reverse = factor * (1 - weight);
  const Real offset = counts ? pair.difference() + pair.reverse() : Real(0);
  visit_row<true>(pair.student, in.vocabulary, [&](Real* values, int64_t first, int size) {
    for (int i = 0; i < size; ++i) {
      const Real logit = values[i];
      Real result = 0;
      if (counts) {
        const Real s = logit * pair.scale, t = pair.t(first + i), q = pair.q(s);
        result = of_forward * (q - pair.p(t));
        if (of_reverse != 0 && q > 0) result += of_reverse * q * (s - t - offset);
      }
      if (labelled) {
        const Real onehot = first + i == label ? Real(1) : Real(0);
        result += ce_scale * (exp(logit - plain.maximum) / plain.total - onehot);
      }
      values[i] = result;
    }
  });
}

template <class T>
__global__ void __launch_bounds__(row_threads) log_sums_kernel(const T* logits_RV, Wide<T>* sums_R, int64_t vocabulary) {
  const LogSum<Wide<T>> sum = log_sum_of(logits_RV + int64_t(blockIdx.x) * vocabulary, vocabulary);
  if (threadIdx.x == 0) sums_R[blockIdx.x] = sum.value();
}

template <class T>
__global__ void __launch_bounds__(row_threads)
    scale_softmax_kernel(T* logits_RV, const Wide<T>* sums_R, const Wide<T>* factors_R, int64_t vocabulary) {
  using Real = Wide<T>;
  const Real sum = sums_R[blockIdx.x] > lowest<Real> ? sums_R[blockIdx.x] : lowest<Real>, factor = factors_R[blockIdx.x];
  visit_row<true>(logits_RV + int64_t(blockIdx.x) * vocabulary, vocabulary, [&](Real* values, int64_t, int size) {
    for (int i = 0; i < size; ++i) values[i] = factor * exp(values[i] - sum);
  });
}

// Calls run(T{}) with the type.
template <class Run>
void with_kind(Float type, Run run) {
  if (type == Float::float32) run(float{});
  if (type == Float::float64) run(double{});
  if (type == Float::bfloat16) run(bfloat16{});
}

}  // namespace

void kl_gradient(const KlRows& in, void* stream) {
  if (in.rows == 0) return;
  with_kind(in.type, [&](auto one) {
    using T = decltype(one);
    // a teacher of another type is float32
    auto kernel = kl_gradient_kernel<T, T>;
    if constexpr (std::is_same_v<T, bfloat16>)
      if (in.teacher_type == Float::float32) kernel = kl_gradient_kernel<bfloat16, float>;
    LAUNCH(kernel, dim3(unsigned(in.rows)), dim3(row_threads), 0, stream)(in);
  });
}

void log_sums(const void* logits, Float type, void* sums, int64_t rows, int64_t vocabulary, void* stream) {
  if (rows == 0) return;
  with_kind(type, [&](auto one) {
    using T = decltype(one);
    const auto kernel = log_sums_kernel<T>;
    LAUNCH(kernel, dim3(unsigned(rows)), dim3(row_threads), 0, stream)
    (static_cast<const T*>(logits), static_cast<Wide<T>*>(sums), vocabulary);
  });
}

void scale_softmax(void* logits, Float type, const void* sums, const void* factors, int64_t rows, int64_t vocabulary, void* stream) {
  if (rows == 0) return;
  with_kind(type, [&](auto one) {
    using T = decltype(one);
    const auto kernel = scale_softmax_kernel<T>;
    LAUNCH(kernel, dim3(unsigned(rows)), dim3(row_threads), 0, stream)
    (static_cast<T*>(logits), static_cast<const Wide<T>*>(sums), static_cast<const Wide<T>*>(factors), vocabulary);
  });
}

}  // namespace kernels
