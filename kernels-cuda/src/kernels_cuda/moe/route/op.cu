// A block takes a slice of tokens, a warp a token at a time. T tokens, K experts of a token, N experts, S slices of tokens.
#include <cmath>
#include <type_traits>

#include "../../include/cuda_ranking.h"
#include "op.h"

namespace kernels {
namespace {

constexpr int threads = 32 * ranking_warps;

template <int per_lane>
__global__ void __launch_bounds__(threads)
    forward_kernel(Routing in, const float* logits_TN, int32_t* idx_TK, float* score_TK, int32_t* count_SN, float* importance_SN) {
  SHARED(float, of_importance, threads* per_lane);
  SHARED(int, of_count, threads* per_lane);
  const int lane = int(threadIdx.x % 32), experts = int(in.experts), k = int(in.selects);
  const int64_t slice = blockIdx.x;
  float importance[per_lane] = {};
  int count[per_lane] = {};
  for (int64_t token = slice * slice_tokens + threadIdx.x / 32; token < slice_end(slice, in.tokens); token += ranking_warps) {
    Ranked<per_lane> top;
    top.find(logits_TN + token * experts, experts, k);
    float score = top.value;
    if (in.softmax) {
      const float largest = __shfl_sync(whole_warp, score, 0), mine = lane < k ? expf(score - largest) : 0.0f;
      float total = mine;
      for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(whole_warp, total, distance);
      score = mine / total;
    }
    if (lane < k) {
      score_TK[token * k + lane] = score;
      idx_TK[token * k + lane] = top.index;
    }
    const bool counts = !in.mask_T || in.mask_T[token];
#pragma unroll
    for (int n = 0; n < per_lane; ++n) {
      const int rank = top.rank[n];
      const float given = __shfl_sync(whole_warp, score, rank < 0 ? 0 : rank);
      if (rank < 0 || !counts) continue;
      importance[n] += given;
      ++count[n];
    }
  }
  add_warps<per_lane>(importance, of_importance, importance_SN + slice * experts, experts);
  add_warps<per_lane>(count, of_count, count_SN + slice * experts, experts);
}

// A thread takes a token.
__global__ void __launch_bounds__(threads) backward_kernel(Routing in, const int32_t* idx_TK, const float* score_TK, const float* dscore_TK,
                                                           const float* dimportance_N, float* dlogits_TN) {
  const int64_t token = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (token >= in.tokens) return;
  const int64_t k = in.selects;
  const bool counts = !in.mask_T || in.mask_T[token];
  const auto gradient = [&](int64_t i) { return dscore_TK[token * k + i] + (counts ? dimportance_N[idx_TK[token * k + i]] : 0.0f); };
  float along = 0.0f;
  if (in.softmax)
    for (int64_t i = 0; i < k; ++i) along += gradient(i) * score_TK[token * k + i];
  float* dlogits = dlogits_TN + token * in.experts;
  for (int64_t j = 0; j < in.experts; ++j) dlogits[j] = 0.0f;
  for (int64_t i = 0; i < k; ++i)
    dlogits[idx_TK[token * k + i]] = in.softmax ? score_TK[token * k + i] * (gradient(i) - along) : gradient(i);
}

}  // namespace

void route_forward(const Routing& in, const float* logits_TN, int32_t* idx_TK, float* score_TK, int32_t* count_SN, float* importance_SN,
                   void* stream) {
  with_per_lane(in.experts, [&](auto per_lane) {
    const auto kernel = forward_kernel<decltype(per_lane)::value>;
    LAUNCH(kernel, dim3(unsigned(num_slices(in.tokens))), dim3(threads), 0, stream)
    (in, logits_TN, idx_TK, score_TK, count_SN, importance_SN);
  });
}

void route_backward(const Routing& in, const int32_t* idx_TK, const float* score_TK, const float* dscore_TK, const float* dimportance_N,
                    float* dlogits_TN, void* stream) {
  LAUNCH(backward_kernel, dim3(unsigned((in.tokens + threads - 1) / threads)), dim3(threads), 0, stream)
  (in, idx_TK, score_TK, dscore_TK, dimportance_N, dlogits_TN);
}

}  // namespace kernels
