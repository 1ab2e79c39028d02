#include "op.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace kernels {
namespace {

// Leaves the weights of the likeliest tokens: they leave a heap one by one, until one of the restrictions ends it.
template <class T>
void restrict_weights(const Reveal& in, const T* logits, std::vector<double>& weights, std::vector<double>& kept,
                      std::vector<int64_t>& ids) {
  double total = 0, before = 0;
  ids.resize(in.valid);
  for (int64_t i = 0; i < in.valid; ++i) {
    ids[i] = i;
    total += weights[i];
  }
  const auto later = [&](int64_t a, int64_t b) {
    const Wide<T> x = widen(logits[a]), y = widen(logits[b]);
    return x < y || (x == y && a > b);
  };
  std::make_heap(ids.begin(), ids.end(), later);
  kept.assign(in.valid, 0.0);
  const int64_t most = in.top_k > 0 ? std::min(in.top_k, in.valid) : in.valid;
  for (int64_t rank = 0; rank < most && (in.top_p == 1 || before < in.top_p * total); ++rank) {
    std::pop_heap(ids.begin(), ids.end() - rank, later);
    const int64_t id = ids[in.valid - 1 - rank];
    kept[id] = weights[id];
    before += weights[id];
  }
  weights.swap(kept);
}

int64_t drawn(const std::vector<double>& weights, double u) {
  double total = 0, passed = 0;
  for (double weight : weights) total += weight;
  int64_t last = 0;
  for (int64_t i = 0; i < int64_t(weights.size()); ++i) {
    if (weights[i] > 0) last = i;
    passed += weights[i];
    if (passed > u * total) return i;
  }
  // rounding may leave nothing above the whole
  return last;
}

template <class T>
int64_t likeliest(const T* logits, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; ++i)
    if (widen(logits[i]) > widen(logits[best])) best = i;
  return best;
}

// In float64, which that of cpu_rows.h is not.
template <class T>
double log_sum(const T* logits, int64_t count, double highest) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += std::exp(double(widen(logits[i])) - highest);
  return highest + std::log(total);
}

}  // namespace

void reveal(const Reveal& in, Float type, void*) {
  with_type(type, [&](auto one) {
    using T = decltype(one);
    torch::stable::parallel_for(0, in.rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> weights, kept;
      std::vector<int64_t> ids;
      for (int64_t row = begin; row < end; ++row) {
        const T* logits = static_cast<const T*>(in.logits) + row * in.width;
        int64_t token = likeliest(logits, in.valid);
        const double highest = widen(logits[token]);
        if (in.temperature > 0) {
          weights.resize(in.valid);
          for (int64_t i = 0; i < in.valid; ++i) weights[i] = std::exp((double(widen(logits[i])) - highest) / in.temperature);
          if (in.restricted()) restrict_weights(in, logits, weights, kept, ids);
          token = drawn(weights, in.uniform(row));
        }
        const double logprob = double(widen(logits[token])) - log_sum(logits, in.valid, highest);
        in.token[row] = token;
        in.logprob[row] = float(logprob);
        in.confidence[row] = float(std::exp(logprob));
      }
    });
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void reveal_op(const Tensor logits, const Tensor slot, const Tensor pos, Tensor token, Tensor logprob, Tensor confidence, int64_t valid,
               double temperature, int64_t top_k, double top_p, int64_t key, int64_t stream) {
  const Stream queue(logits);
  reveal({logits.data_ptr(), pointer_to<int64_t>(slot), pointer_to<int64_t>(pos), pointer_to<int64_t>(token), pointer_to<float>(logprob),
          pointer_to<float>(confidence), logits.size(0), logits.size(1), valid, temperature, top_k, top_p, key, uint32_t(stream)},
         float_type(logits), queue.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(mdm, library) { library.impl("reveal", TORCH_BOX(&kernels::reveal_op)); }
