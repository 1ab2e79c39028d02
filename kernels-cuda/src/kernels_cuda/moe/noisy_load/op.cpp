// T tokens, N experts, S slices of tokens
#include "op.h"

#include <algorithm>

#include "../../include/cpu_rows.h"
#include "../../include/registration.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
// The CPU twin of op.cu: one token of a slice after the other.
namespace {

// Phi by a rational fit of erfc (Press et al., Numerical Recipes, section 6.2), relative error below 2e-7 where it is not tiny.
inline floats normal_cdf(floats x) {
  const floats z = (x < 0.0f ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * z);
  floats series = splat(0.17087277f);
  for (const float next : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f})
    series = series * t + next;
  const floats half_erfc = 0.5f * t * exponential(series * t - 1.26551223f - z * z);
  return x < 0.0f ? half_erfc : 1.0f - half_erfc;
}

// What each expert of a token has to exceed.
struct Thresholds {
  float value[max_experts];
  bool chosen[max_experts];
  Top top;

  void find(const NoisyRows& in, int64_t token) {
    const int64_t k = in.selects;
    top.find(in.noisy_TN + token * in.experts, in.experts, k + 1);
    std::fill(value, value + in.experts, top.value[k - 1]);
    std::fill(chosen, chosen + in.experts, false);
    for (int64_t i = 0; i < k; ++i) {
      value[top.index[i]] = top.value[k];
      chosen[top.index[i]] = true;
    }
  }
};

}  // namespace

void noisy_load_forward(const NoisyRows& in, float* load_SN, void*) {
  torch::stable::parallel_for(0, num_slices(in.tokens), 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      double total[max_experts] = {};
      for (int64_t token = slice * slice_tokens; token < slice_end(slice, in.tokens); ++token) {
        if (in.mask_T && !in.mask_T[token]) continue;
        Thresholds tau;
        tau.find(in, token);
        float chance[max_experts];
        const int64_t row = token * in.experts;
        each_lanes<float>(0, in.experts, [&](int64_t j, int64_t present) {
          const floats distance = get(in.logits_TN + row + j, present, 0.0f) - get(tau.value + j, present, 0.0f);
          put(chance + j, normal_cdf(distance / get(in.sigma_TN + row + j, present, 1.0f)), present);
        });
        for (int64_t j = 0; j < in.experts; ++j) total[j] += chance[j];
      }
      for (int64_t j = 0; j < in.experts; ++j) load_SN[slice * in.experts + j] = float(total[j]);
    }
  });
}

void noisy_load_backward(const NoisyRows& in, const float* dload_N, float* dlogits_TN, float* dnoisy_TN, float* dsigma_TN, void*) {
  torch::stable::parallel_for(0, num_slices(in.tokens), 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin * slice_tokens; token < slice_end(end - 1, in.tokens); ++token) {
      const int64_t row = token * in.experts, k = in.selects;
      std::fill(dnoisy_TN + row, dnoisy_TN + row + in.experts, 0.0f);
      if (in.mask_T && !in.mask_T[token]) {
        std::fill(dlogits_TN + row, dlogits_TN + row + in.experts, 0.0f);
        std::fill(dsigma_TN + row, dsigma_TN + row + in.experts, 0.0f);
        continue;
      }
      Thresholds tau;
      tau.find(in, token);
      each_lanes<float>(0, in.experts, [&](int64_t j, int64_t present) {
        const floats sigma = get(in.sigma_TN + row + j, present, 1.0f);
        const floats u = (get(in.logits_TN + row + j, present, 0.0f) - get(tau.value + j, present, 0.0f)) / sigma;
        const floats slope = get(dload_N + j, present, 0.0f) * 0.39894228f * exponential(-0.5f * u * u) / sigma;
        put(dlogits_TN + row + j, slope, present);
        // where u is infinite the slope is zero
        put(dsigma_TN + row + j, slope == 0.0f ? splat(0.0f) : -slope * u, present);
      });
      float of_chosen = 0.0f, of_others = 0.0f;
      for (int64_t j = 0; j < in.experts; ++j) (tau.chosen[j] ? of_chosen : of_others) += dlogits_TN[row + j];
      dnoisy_TN[row + tau.top.index[k]] = -of_chosen;
      dnoisy_TN[row + tau.top.index[k - 1]] = -of_others;
    }
  });
}
#endif

namespace {

NoisyRows inputs(const Tensor& logits, const Tensor& noisy, const Tensor& sigma, const std::optional<Tensor>& mask, int64_t k) {
  return {logits.size(0),           logits.size(1),        k, pointer_to<float>(logits), pointer_to<float>(noisy),
          pointer_to<float>(sigma), pointer_to<bool>(mask)};
}

void forward_op(const Tensor logits, const Tensor noisy, const Tensor sigma, const std::optional<Tensor> mask, int64_t k, Tensor load) {
  const Stream stream(logits);
  noisy_load_forward(inputs(logits, noisy, sigma, mask, k), pointer_to<float>(load), stream.handle);
}

void backward_op(const Tensor logits, const Tensor noisy, const Tensor sigma, const std::optional<Tensor> mask, int64_t k,
                 const Tensor dload, Tensor dlogits, Tensor dnoisy, Tensor dsigma) {
  const Stream stream(logits);
  noisy_load_backward(inputs(logits, noisy, sigma, mask, k), pointer_to<float>(dload), pointer_to<float>(dlogits),
                      pointer_to<float>(dnoisy), pointer_to<float>(dsigma), stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(moe, library) {
  library.impl("noisy_load_forward_", TORCH_BOX(&kernels::forward_op));
  library.impl("noisy_load_backward_", TORCH_BOX(&kernels::backward_op));
}
