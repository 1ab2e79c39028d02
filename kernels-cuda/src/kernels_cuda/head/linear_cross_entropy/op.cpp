// R rows of one chunk of logits, V vocabulary
#include "../../include/cpu_rows.h"
#include "../../include/registration.h"
#include "op.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
// The CPU twin of op.cu: the same functions, a row per thread at a time.
namespace {

template <class T>
void softmax_gradient_of_row(T* logits_V, int64_t vocabulary, int64_t label, Wide<T> weight, Wide<T>& loss, bool gradient) {
  const bool valid = label >= 0 && label < vocabulary;
  const Wide<T> nan = std::numeric_limits<Wide<T>>::quiet_NaN();
  const Wide<T> label_logit = valid ? widen(logits_V[label]) : nan;
  const LogSum<T> row = log_sum_of(logits_V, vocabulary);
  loss = Wide<T>(std::log(row.total) + (double(row.maximum) - double(label_logit)));
  if (!gradient) return;
  scale_exponentials(logits_V, vocabulary, row.maximum, valid ? Wide<T>(weight / row.total) : nan);
  if (valid) logits_V[label] = narrow<T>(Wide<T>(weight * std::exp(double(label_logit) - row.maximum) / row.total - weight));
}

}  // namespace

void softmax_gradient(void* logits, Float type, const int64_t* labels, const void* weights, void* losses, int64_t rows, int64_t vocabulary,
                      int64_t ignore_index, bool gradient, void*) {
  with_type(type, [&](auto one) {
    using T = decltype(one);
    const auto weights_R = static_cast<const Wide<T>*>(weights);
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* logits_V = static_cast<T*>(logits) + row * vocabulary;
        Wide<T>& loss = static_cast<Wide<T>*>(losses)[row];
        if (labels[row] != ignore_index) {
          softmax_gradient_of_row(logits_V, vocabulary, labels[row], weights_R ? weights_R[row] : Wide<T>(1), loss, gradient);
        } else {
          loss = 0;
          if (gradient) std::memset(logits_V, 0, sizeof(T) * vocabulary);
        }
      }
    });
  });
}

namespace {
constexpr int64_t split_grain = 16384;
}

void add_split(uint16_t* high, uint16_t* low, const void* part_bfloat16, int64_t count, void*) {
  const auto* part = static_cast<const uint16_t*>(part_bfloat16);
  torch::stable::parallel_for(0, count, split_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float before = float_of(uint32_t(high[i]) << 16 | low[i]);
      const uint32_t after = bits_of(before + float_of(uint32_t(part[i]) << 16));
      high[i] = uint16_t(after >> 16);
      low[i] = uint16_t(after);
    }
  });
}

void round_split(uint16_t* high, const uint16_t* low, int64_t count, void*) {
  torch::stable::parallel_for(0, count, split_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) high[i] = bfloat16_bits(float_of(uint32_t(high[i]) << 16 | low[i]));
  });
}
#endif

namespace {

void softmax_gradient_op(Tensor logits_RV, const Tensor labels_R, const std::optional<Tensor> weights_R, Tensor losses_R,
                         int64_t ignore_index, bool gradient) {
  const Stream stream(logits_RV);
  softmax_gradient(logits_RV.data_ptr(), float_type(logits_RV), pointer_to<int64_t>(labels_R), pointer_to<void>(weights_R),
                   losses_R.data_ptr(), logits_RV.size(0), logits_RV.size(1), ignore_index, gradient, stream.handle);
}

void add_split_op(Tensor high, Tensor low, const Tensor part) {
  const Stream stream(high);
  add_split(pointer_to<uint16_t>(high), pointer_to<uint16_t>(low), part.data_ptr(), high.numel(), stream.handle);
}

void round_split_op(Tensor high, const Tensor low) {
  const Stream stream(high);
  round_split(pointer_to<uint16_t>(high), pointer_to<uint16_t>(low), high.numel(), stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(head, library) {
  library.impl("softmax_gradient_", TORCH_BOX(&kernels::softmax_gradient_op));
  library.impl("add_split_", TORCH_BOX(&kernels::add_split_op));
  library.impl("round_split_", TORCH_BOX(&kernels::round_split_op));
}
