// R rows of one chunk, V vocabulary; s and t are the logits of student and teacher over the temperature, q and p their softmax.
#include <vector>

#include "../../include/cpu_rows.h"
#include "../../include/registration.h"
#include "op.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
// The CPU twin of op.cu: the same functions, a row per thread at a time.
namespace {

// Student (T) and teacher (U) of one row.
template <class T, class U>
struct Pair {
  T* student;
  const U* teacher;
  int64_t count;
  Wide<T> scale;  // 1 / temperature

  // Calls visit(s, t, first index, how many exist); what does not exist is -infinity.
  template <class Visit>
  void each(int64_t begin, int64_t end, Visit visit) const {
    const Wide<T> fill = -std::numeric_limits<Wide<T>>::infinity();
    each_lanes<T>(begin, end, [&](int64_t i, int64_t present) {
      visit(get(student + i, present, fill) * scale, get(teacher + i, present, fill) * scale, i, present);
    });
  }
};

struct Divergence {
  double forward, reverse;
};

// Log-sums of both and the divergences in one pass: with sums of p (t - s) and q (s - t), a value whose probability is zero adds nothing.
template <class T, class U>
Divergence divergence_of(const Pair<T, U>& pair, LogSum<T>& student, LogSum<T>& teacher) {
  using L = Lanes<T>;
  double student_distance = 0, teacher_distance = 0;
  const L zero = filled<T>(0);
  for (int64_t begin = 0; begin < pair.count; begin += block_values) {
    const int64_t end = std::min(begin + block_values, pair.count);
    L highest_s = filled<T>(student.maximum), highest_t = filled<T>(teacher.maximum);
    pair.each(begin, end, [&](L s, L t, int64_t, int64_t) {
      highest_s = larger(s, highest_s);
      highest_t = larger(t, highest_t);
    });
    student_distance *= student.raise(largest(highest_s));
    teacher_distance *= teacher.raise(largest(highest_t));
    L total_s = zero, total_t = zero, distance_s = zero, distance_t = zero;
    pair.each(begin, end, [&](L s, L t, int64_t, int64_t) {
      const L q = exponential(s - student.maximum), p = exponential(t - teacher.maximum), distance = t - s;
      total_s += q;
      total_t += p;
      distance_s -= q > zero ? q * distance : zero;
      distance_t += p > zero ? p * distance : zero;
    });
    student.total += sum(total_s);
    teacher.total += sum(total_t);
    student_distance += sum(distance_s);
    teacher_distance += sum(distance_t);
  }
  const double difference = student.value() - teacher.value();
  return {teacher_distance / teacher.total + difference, student_distance / student.total - difference};
}

template <class Real>
using BitsOf = std::conditional_t<std::is_same_v<Real, double>, uint64_t, uint32_t>;

// The number whose bits these are; more bits are more, for numbers that are not negative.
template <class Real>
Real from_bits(BitsOf<Real> bits) {
  Real value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Real>
BitsOf<Real> to_bits(Real value) {
  BitsOf<Real> bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <class Real>
double mass_from(const std::vector<Real>& p, Real least) {
  using L = Lanes<Real>;
  double total = 0;
  const int64_t count = int64_t(p.size());
  for (int64_t begin = 0; begin < count; begin += block_values) {
    L part = filled<Real>(0);
    each_lanes<Real>(begin, std::min(begin + block_values, count), [&](int64_t i, int64_t present) {
      const L x = get(p.data() + i, present, Real(0));
      part += x >= least ? x : filled<Real>(0);
    });
    total += sum(part);
  }
  return total;
}

// Weight of the forward divergence: the gaps |p - q| over the head set, as a part of all gaps. The head set is found by bisection for
// its smallest probability; of several equal ones the first come first.
template <class T, class U>
double adaptive_weight(const Pair<T, U>& pair, const LogSum<T>& student, const LogSum<T>& teacher) {
  using Real = Wide<T>;
  std::vector<Real> p(size_t(pair.count)), gap(size_t(pair.count));
  const Real student_scale = Real(1 / student.total), teacher_scale = Real(1 / teacher.total);
  pair.each(0, pair.count, [&](Lanes<T> s, Lanes<T> t, int64_t i, int64_t present) {
    const Lanes<T> of_teacher = exponential(t - teacher.maximum) * teacher_scale;
    const Lanes<T> difference = of_teacher - exponential(s - student.maximum) * student_scale;
    put(p.data() + i, of_teacher, present);
    put(gap.data() + i, larger(difference, -difference), present);
  });
  BitsOf<Real> low = 0, high = to_bits(Real(2));
  while (high - low > 1) {
    const BitsOf<Real> middle = low + (high - low) / 2;
    (mass_from(p, from_bits<Real>(middle)) >= half_mass ? low : high) = middle;
  }
  const Real least = from_bits<Real>(low);
  double missing = half_mass - mass_from(p, from_bits<Real>(low + 1));
  double of_head = 0, of_tail = 0;
  for (int64_t i = 0; i < pair.count; ++i) {
    const bool in_head = p[size_t(i)] > least || (p[size_t(i)] == least && missing > 0);
    if (p[size_t(i)] == least) missing -= least;
    (in_head ? of_head : of_tail) += gap[size_t(i)];
  }
  return of_head + of_tail == 0 ? 0.5 : of_head / (of_head + of_tail);
}

// The gradient's factors: forward (q - p) + reverse q (s - t - offset) + ce softmax(student logits).
struct Factors {
  double forward, reverse, ce, offset;
};

template <bool with_reverse, bool other_temperature, class T, class U>
void write_gradient(const Pair<T, U>& pair, const LogSum<T>& student, const LogSum<T>& teacher, const LogSum<T>& plain,
                    const Factors& by) {
  using Real = Wide<T>;
  using L = Lanes<T>;
  const Real of_q = Real((by.forward + (other_temperature ? 0 : by.ce)) / student.total), of_p = Real(by.forward / teacher.total);
  const Real of_distance = Real(by.reverse / student.total), offset = Real(by.offset), of_plain = Real(by.ce / plain.total);
  const L zero = filled<T>(0);
  pair.each(0, pair.count, [&](L s, L t, int64_t i, int64_t present) {
    const L q = exponential(s - student.maximum);
    L result = q * of_q - exponential(t - teacher.maximum) * of_p;
    if (with_reverse) result += q > zero ? q * of_distance * (s - t - offset) : zero;
    if (other_temperature) result += exponential(get(pair.student + i, present, Real(0)) - plain.maximum) * of_plain;
    put(pair.student + i, result, present);
  });
}

// Of the divergence, at one place.
template <class T, class U>
double divergence_gradient(const Pair<T, U>& pair, int64_t i, const LogSum<T>& student, const LogSum<T>& teacher, const Factors& by) {
  const double s = double(widen(pair.student[i])) * pair.scale, t = double(widen(pair.teacher[i])) * pair.scale;
  const double q = std::exp(s - student.maximum) / student.total, p = std::exp(t - teacher.maximum) / teacher.total;
  return by.forward * (q - p) + (by.reverse != 0 && q > 0 ? by.reverse * q * (s - t - by.offset) : 0);
}

template <class T, class U>
void kl_gradient_of_row(const KlRows& in, int64_t row) {
  using Real = Wide<T>;
  const Real nan = std::numeric_limits<Real>::quiet_NaN();
  const Pair<T, U> pair{static_cast<T*>(in.student) + row * in.vocabulary, static_cast<const U*>(in.teacher) + row * in.teacher_stride,
                        in.vocabulary, Real(1 / in.temperature)};
  const bool counts = !in.mask || in.mask[row];
  const int64_t label = in.labels ? in.labels[row] : ignored_label;
  const bool labelled = label != ignored_label, valid = label >= 0 && label < in.vocabulary;
  const bool other_temperature = labelled && in.temperature != 1;
  const Real* scales = static_cast<const Real*>(in.scales);
  const Real label_logit = valid ? widen(pair.student[label]) : nan;
  const double ce_scale = labelled ? (valid ? scales[1] : nan) : 0, kl_scale = scales[0];
  Real& kl = static_cast<Real*>(in.kl)[row];
  Real& ce = static_cast<Real*>(in.ce)[row];
  kl = ce = 0;

  LogSum<T> student, teacher, plain;
  Divergence divergence{};
  if (counts) {
    divergence = divergence_of(pair, student, teacher);
    plain = student;
  }
  if (labelled && (!counts || other_temperature)) plain = log_sum_of(pair.student, in.vocabulary);
  if (labelled) ce = Real(std::log(plain.total) + (double(plain.maximum) - double(label_logit)));
  double weight = in.direction == Direction::forward ? 1 : 0;
  if (counts && in.direction == Direction::adaptive) weight = adaptive_weight(pair, student, teacher);
  // an infinite divergence of weight zero is none
  const auto part = [&](double factor, double value) { return factor == 0 ? 0 : factor * value; };
  if (counts)
    kl = Real(in.temperature * in.temperature * (part(weight, divergence.forward) + part(1 - weight, divergence.reverse)));
  if (!in.gradient) return;

  // The label's own gradient, before the row is overwritten: its parts may cancel, so it is rounded once.
  double at_label = valid ? ce_scale * (std::exp(double(label_logit) - plain.maximum) / plain.total - 1) : 0;
  if (!counts) {
    if (labelled)
      scale_exponentials(pair.student, in.vocabulary, plain.maximum, Real(ce_scale / plain.total));
    else
      std::memset(static_cast<void*>(pair.student), 0, sizeof(T) * size_t(in.vocabulary));
  } else {
    const double factor = kl_scale * in.temperature;
    const Factors by{factor * weight, factor * (1 - weight), ce_scale, student.value() - teacher.value() + divergence.reverse};
    if (valid) at_label += divergence_gradient(pair, label, student, teacher, by);
    const auto write = by.reverse != 0 ? (other_temperature ? write_gradient<true, true, T, U> : write_gradient<true, false, T, U>)
                                       : (other_temperature ? write_gradient<false, true, T, U> : write_gradient<false, false, T, U>);
    write(pair, student, teacher, plain, by);
  }
  if (valid) pair.student[label] = narrow<T>(Real(at_label));
}

template <class Run>
void each_row(int64_t rows, Run run) {
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(row);
  });
}

}  // namespace

void kl_gradient(const KlRows& in, void*) {
  with_type(in.type, [&](auto one) {
    using T = decltype(one);
    each_row(in.rows, [&](int64_t row) {
      // a teacher of another type is float32
      if (std::is_same_v<T, bfloat16> && in.teacher_type == Float::float32)
        kl_gradient_of_row<bfloat16, float>(in, row);
      else
        kl_gradient_of_row<T, T>(in, row);
    });
  });
}

void log_sums(const void* logits, Float type, void* sums, int64_t rows, int64_t vocabulary, void*) {
  with_type(type, [&](auto one) {
    using T = decltype(one);
    each_row(rows, [&](int64_t row) {
      static_cast<Wide<T>*>(sums)[row] = Wide<T>(log_sum_of(static_cast<const T*>(logits) + row * vocabulary, vocabulary).value());
    });
  });
}

void scale_softmax(void* logits, Float type, const void* sums, const void* factors, int64_t rows, int64_t vocabulary, void*) {
  with_type(type, [&](auto one) {
    using T = decltype(one);
    each_row(rows, [&](int64_t row) {
      const Wide<T> sum = std::max(static_cast<const Wide<T>*>(sums)[row], Wide<T>(std::numeric_limits<float>::lowest()));
      scale_exponentials(static_cast<T*>(logits) + row * vocabulary, vocabulary, sum, static_cast<const Wide<T>*>(factors)[row]);
    });
  });
}
#endif

namespace {

void kl_gradient_op(Tensor student_RV, const Tensor teacher_RV, const std::optional<Tensor> mask_R, const std::optional<Tensor> labels_R,
                    const Tensor scales, Tensor kl_R, Tensor ce_R, double temperature, int64_t direction, bool gradient) {
  const Stream stream(student_RV);
  const KlRows in{student_RV.data_ptr(),
                  float_type(student_RV),
                  teacher_RV.data_ptr(),
                  float_type(teacher_RV),
                  teacher_RV.stride(0),
                  student_RV.size(0),
                  student_RV.size(1),
                  pointer_to<bool>(mask_R),
                  pointer_to<int64_t>(labels_R),
                  scales.data_ptr(),
                  kl_R.data_ptr(),
                  ce_R.data_ptr(),
                  temperature,
                  Direction(direction),
                  gradient};
  kl_gradient(in, stream.handle);
}

void log_sums_op(const Tensor logits_RV, Tensor sums_R) {
  const Stream stream(logits_RV);
  log_sums(logits_RV.data_ptr(), float_type(logits_RV), sums_R.data_ptr(), logits_RV.size(0), logits_RV.size(1), stream.handle);
}

void scale_softmax_op(Tensor logits_RV, const Tensor sums_R, const Tensor factors_R) {
  const Stream stream(logits_RV);
  scale_softmax(logits_RV.data_ptr(), float_type(logits_RV), sums_R.data_ptr(), factors_R.data_ptr(), logits_RV.size(0), logits_RV.size(1),
                stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(head, library) {
  library.impl("kl_gradient_", TORCH_BOX(&kernels::kl_gradient_op));
  library.impl("log_sums_", TORCH_BOX(&kernels::log_sums_op));
  library.impl("scale_softmax_", TORCH_BOX(&kernels::scale_softmax_op));
}
