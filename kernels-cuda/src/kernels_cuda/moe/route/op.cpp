// T tokens, K experts of a token, N experts, S slices of tokens
#include "op.h"

#include <algorithm>
#include <limits>

#include "../../include/cpu_vector.h"
#include "../../include/registration.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
// The CPU twin of op.cu: one token of a slice after the other.

void route_forward(const Routing& in, const float* logits_TN, int32_t* idx_TK, float* score_TK, int32_t* count_SN, float* importance_SN,
                   void*) {
  const int64_t experts = in.experts, k = in.selects;
  torch::stable::parallel_for(0, num_slices(in.tokens), 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      double importance[max_experts] = {};
      int32_t* count = count_SN + slice * experts;
      std::fill(count, count + experts, 0);
      for (int64_t token = slice * slice_tokens; token < slice_end(slice, in.tokens); ++token) {
        Top top;
        top.find(logits_TN + token * experts, experts, k);
        float total = 1.0f;
        if (in.softmax) {
          // at most 16 values, of which the first is the largest
          const floats shares = exponential(load_tail(top.value, k, -std::numeric_limits<float>::infinity()) - top.value[0]);
          store(top.value, shares);
          total = float(sum(shares));
        }
        const bool counts = !in.mask_T || in.mask_T[token];
        for (int64_t i = 0; i < k; ++i) {
          const float score = top.value[i] / total;
          score_TK[token * k + i] = score;
          idx_TK[token * k + i] = top.index[i];
          if (!counts) continue;
          importance[top.index[i]] += score;
          ++count[top.index[i]];
        }
      }
      for (int64_t j = 0; j < experts; ++j) importance_SN[slice * experts + j] = float(importance[j]);
    }
  });
}

void route_backward(const Routing& in, const int32_t* idx_TK, const float* score_TK, const float* dscore_TK, const float* dimportance_N,
                    float* dlogits_TN, void*) {
  const int64_t experts = in.experts, k = in.selects;
  torch::stable::parallel_for(0, num_slices(in.tokens), 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin * slice_tokens; token < slice_end(end - 1, in.tokens); ++token) {
      const bool counts = !in.mask_T || in.mask_T[token];
      float gradient[max_selects], along = 0.0f;
      for (int64_t i = 0; i < k; ++i) {
        gradient[i] = dscore_TK[token * k + i] + (counts ? dimportance_N[idx_TK[token * k + i]] : 0.0f);
        along += gradient[i] * score_TK[token * k + i];
      }
      float* dlogits = dlogits_TN + token * experts;
      std::fill(dlogits, dlogits + experts, 0.0f);
      for (int64_t i = 0; i < k; ++i)
        dlogits[idx_TK[token * k + i]] = in.softmax ? score_TK[token * k + i] * (gradient[i] - along) : gradient[i];
    }
  });
}
#endif

namespace {

void forward_op(const Tensor logits, const std::optional<Tensor> mask, bool softmax, Tensor idx, Tensor score, Tensor count,
                Tensor importance) {
  const Stream stream(logits);
  route_forward({logits.size(0), logits.size(1), idx.size(1), pointer_to<bool>(mask), softmax}, pointer_to<float>(logits),
                pointer_to<int32_t>(idx), pointer_to<float>(score), pointer_to<int32_t>(count), pointer_to<float>(importance),
                stream.handle);
}

void backward_op(const Tensor idx, const Tensor score, const std::optional<Tensor> mask, bool softmax, const Tensor dscore,
                 const Tensor dimportance, Tensor dlogits) {
  const Stream stream(score);
  route_backward({dlogits.size(0), dlogits.size(1), idx.size(1), pointer_to<bool>(mask), softmax}, pointer_to<int32_t>(idx),
                 pointer_to<float>(score), pointer_to<float>(dscore), pointer_to<float>(dimportance), pointer_to<float>(dlogits),
                 stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(moe, library) {
  library.impl("route_forward_", TORCH_BOX(&kernels::forward_op));
  library.impl("route_backward_", TORCH_BOX(&kernels::backward_op));
}
