// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
// T tokens, K experts of a token, N experts, S slices of tokens.
#pragma once
#include "../../include/ranking.h"
#include "../../include/token_slices.h"

namespace kernels {

struct Routing {
  int64_t tokens, experts, selects;
  const bool* mask_T;  // null: all tokens count
  bool softmax;
};

// idx_TK and score_TK of every token; count_SN and importance_SN hold the sums over each slice's tokens.
void route_forward(const Routing& in, const float* logits_TN, int32_t* idx_TK, float* score_TK, int32_t* count_SN, float* importance_SN,
                   void* stream);

void route_backward(const Routing& in, const int32_t* idx_TK, const float* score_TK, const float* dscore_TK, const float* dimportance_N,
                    float* dlogits_TN, void* stream);

}  // namespace kernels
