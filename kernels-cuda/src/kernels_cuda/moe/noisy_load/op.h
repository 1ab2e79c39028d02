// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header. T tokens, N experts, S slices of tokens.
#pragma once
#include "../../include/ranking.h"
#include "../../include/token_slices.h"

namespace kernels {

struct NoisyRows {
  int64_t tokens, experts, selects;
  const float *logits_TN, *noisy_TN, *sigma_TN;
  const bool* mask_T;  // null: all tokens count
};

// The sums over each slice's tokens.
void noisy_load_forward(const NoisyRows& in, float* load_SN, void* stream);

void noisy_load_backward(const NoisyRows& in, const float* dload_N, float* dlogits_TN, float* dnoisy_TN, float* dsigma_TN, void* stream);

}  // namespace kernels
