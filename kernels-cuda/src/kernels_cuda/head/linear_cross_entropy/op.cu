// R rows of one chunk of logits, V vocabulary
#include "../../include/cuda_rows.h"
#include "op.h"

namespace kernels {
namespace {

constexpr int flat_threads = 256;

// One block per row: read the row once for maximum and sum, once more (from L2) for the gradient.
template <class T, bool gradient>
__global__ void __launch_bounds__(row_threads) softmax_gradient_kernel(T* logits_RV, const int64_t* labels_R, const Wide<T>* weights_R,
                                                                       Wide<T>* losses_R, int64_t vocabulary, int64_t ignore_index) {
  using Real = Wide<T>;
  const int64_t row = blockIdx.x;
  T* logits_V = logits_RV + row * vocabulary;
  const int64_t label = labels_R[row];
  if (label == ignore_index) {
    if (threadIdx.x == 0) losses_R[row] = 0;
    if (gradient) {
      visit_row<true>(logits_V, vocabulary, [](Real* values, int64_t, int size) {
        for (int i = 0; i < size; ++i) values[i] = 0;
      });
    }
    return;
  }
  const bool valid = label >= 0 && label < vocabulary;
  // read before the barrier below: after it the gradient may stand there
  const Real label_logit = valid ? widen(logits_V[label]) : Real(NAN);

  const LogSum<Real> row_sum = log_sum_of(logits_V, vocabulary);
  if (threadIdx.x == 0) losses_R[row] = log(row_sum.total) + (row_sum.maximum - label_logit);

  if (gradient) {
    const Real weight = !valid ? Real(NAN) : weights_R ? weights_R[row] : Real(1);
    const Real scale = weight / row_sum.total;
    visit_row<true>(logits_V, vocabulary, [&](Real* values, int64_t first, int size) {
      for (int i = 0; i < size; ++i) {
        const Real onehot = first + i == label ? weight : Real(0);
        values[i] = scale * exp(values[i] - row_sum.maximum) - onehot;
      }
    });
  }
}

template <class T>
void launch_softmax_gradient(void* logits, const int64_t* labels, const void* weights, void* losses, int64_t rows, int64_t vocabulary,
                             int64_t ignore_index, bool gradient, void* stream) {
  const auto kernel = gradient ? softmax_gradient_kernel<T, true> : softmax_gradient_kernel<T, false>;
  LAUNCH(kernel, dim3(unsigned(rows)), dim3(row_threads), 0, stream)
  (static_cast<T*>(logits), labels, static_cast<const Wide<T>*>(weights), static_cast<Wide<T>*>(losses), vocabulary, ignore_index);
}

struct One {
  static constexpr int size = 1;
  uint16_t values[1];
};

// `Words` is a Pack<uint16_t> or One; `part` is null when the sum is only to be rounded.
template <class Words>
__global__ void __launch_bounds__(flat_threads)
    split_kernel(uint16_t* high_words, uint16_t* low_words, const uint16_t* part_words, int64_t count) {
  const int64_t k = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (k >= count) return;
  Words* high = reinterpret_cast<Words*>(high_words) + k;
  Words* low = reinterpret_cast<Words*>(low_words) + k;
  Words upper = *high, lower = *low, part{};
  if (part_words) part = reinterpret_cast<const Words*>(part_words)[k];
  for (int i = 0; i < Words::size; ++i) {
    const float before = float_of(uint32_t(upper.values[i]) << 16 | lower.values[i]);
    if (part_words) {
      const uint32_t after = bits_of(before + float_of(uint32_t(part.values[i]) << 16));
      upper.values[i] = uint16_t(after >> 16);
      lower.values[i] = uint16_t(after);
    } else {
      upper.values[i] = bfloat16_bits(before);
    }
  }
  *high = upper;
  if (part_words) *low = lower;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class Words>
void launch_split(uint16_t* high, uint16_t* low, const uint16_t* part, int64_t count, void* stream) {
  if (count == 0) return;
  const auto kernel = split_kernel<Words>;
  LAUNCH(kernel, dim3(unsigned((count + flat_threads - 1) / flat_threads)), dim3(flat_threads), 0, stream)
  (high, low, part, count);
}

void split(uint16_t* high, uint16_t* low, const uint16_t* part, int64_t count, void* stream) {
  using Eight = Pack<uint16_t>;
  const int64_t packs = aligned(high) && aligned(low) && aligned(part) ? count / Eight::size : 0;
  const int64_t done = packs * Eight::size;
  launch_split<Eight>(high, low, part, packs, stream);
  launch_split<One>(high + done, low + done, part ? part + done : nullptr, count - done, stream);
}

}  // namespace

void softmax_gradient(void* logits, Float type, const int64_t* labels, const void* weights, void* losses, int64_t rows, int64_t vocabulary,
                      int64_t ignore_index, bool gradient, void* stream) {
  if (rows == 0) return;
  const auto launch = type == Float::float32   ? launch_softmax_gradient<float>
                      : type == Float::float64 ? launch_softmax_gradient<double>
                                               : launch_softmax_gradient<bfloat16>;
  launch(logits, labels, weights, losses, rows, vocabulary, ignore_index, gradient, stream);
}

void add_split(uint16_t* high, uint16_t* low, const void* part_bfloat16, int64_t count, void* stream) {
  split(high, low, static_cast<const uint16_t*>(part_bfloat16), count, stream);
}

void round_split(uint16_t* high, const uint16_t* low, int64_t count, void* stream) {
  split(high, const_cast<uint16_t*>(low), nullptr, count, stream);
}

}  // namespace kernels
