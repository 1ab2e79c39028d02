// A block takes a slice of tokens, a warp a token at a time. T tokens, N experts, S slices of tokens.
#include <cmath>
#include <type_traits>

#include "../../include/cuda_ranking.h"
#include "op.h"

namespace kernels {
namespace {

constexpr int threads = 32 * ranking_warps;

// Calls use(token, its ranking, n, j, u, sigma) for each expert j = lane + 32 n of each token of the block's slice that counts, and
// end(token, its ranking or null) after each token.
template <int per_lane, class Use, class End>
__device__ __forceinline__ void each_chance(const NoisyRows& in, Use use, End end) {
  const int lane = int(threadIdx.x % 32), experts = int(in.experts), k = int(in.selects);
  const int64_t slice = blockIdx.x;
  for (int64_t token = slice * slice_tokens + threadIdx.x / 32; token < slice_end(slice, in.tokens); token += ranking_warps) {
    Ranked<per_lane> top;
    const bool counts = !in.mask_T || in.mask_T[token];
    if (counts) {
      top.find(in.noisy_TN + token * experts, experts, k + 1);
      const float of_chosen = __shfl_sync(whole_warp, top.value, k), of_others = __shfl_sync(whole_warp, top.value, k - 1);
#pragma unroll
      for (int n = 0; n < per_lane; ++n) {
        const int j = lane + 32 * n;
        if (j >= experts) continue;
        const bool chosen = top.rank[n] >= 0 && top.rank[n] < k;
        const float sigma = in.sigma_TN[token * experts + j];
        use(token, chosen, n, j, (in.logits_TN[token * experts + j] - (chosen ? of_chosen : of_others)) / sigma, sigma);
      }
    }
    end(token, counts ? &top : nullptr);
  }
}

template <int per_lane>
__global__ void __launch_bounds__(threads) forward_kernel(NoisyRows in, float* load_SN) {
  SHARED(float, sums, threads* per_lane);
  float mine[per_lane] = {};
  each_chance<per_lane>(
      in, [&](int64_t, bool, int n, int, float u, float) { mine[n] += 0.5f * erfcf(-u * 0.70710678f); },
      [](int64_t, const Ranked<per_lane>*) {});
  add_warps<per_lane>(mine, sums, load_SN + int64_t(blockIdx.x) * in.experts, int(in.experts));
}

template <int per_lane>
__global__ void __launch_bounds__(threads)
    backward_kernel(NoisyRows in, const float* dload_N, float* dlogits_TN, float* dnoisy_TN, float* dsigma_TN) {
  const int lane = int(threadIdx.x % 32), experts = int(in.experts), k = int(in.selects);
  float of_chosen = 0.0f, of_others = 0.0f;
  each_chance<per_lane>(
      in,
      [&](int64_t token, bool chosen, int, int j, float u, float sigma) {
        const float slope = dload_N[j] * 0.39894228f * expf(-0.5f * u * u) / sigma;
        dlogits_TN[token * experts + j] = slope;
        // where u is infinite the slope is zero
        dsigma_TN[token * experts + j] = slope == 0.0f ? 0.0f : -slope * u;
        (chosen ? of_chosen : of_others) += slope;
      },
      [&](int64_t token, const Ranked<per_lane>* top) {
        for (int distance = 16; distance > 0; distance /= 2) {
          of_chosen += __shfl_xor_sync(whole_warp, of_chosen, distance);
          of_others += __shfl_xor_sync(whole_warp, of_others, distance);
        }
#pragma unroll
        for (int n = 0; n < per_lane; ++n) {
          const int j = lane + 32 * n;
          if (j >= experts) continue;
          if (!top) dlogits_TN[token * experts + j] = dsigma_TN[token * experts + j] = 0.0f;
          const int rank = top ? top->rank[n] : -1;
          dnoisy_TN[token * experts + j] = rank == k ? -of_chosen : rank == k - 1 ? -of_others : 0.0f;
        }
        of_chosen = of_others = 0.0f;
      });
}

}  // namespace

void noisy_load_forward(const NoisyRows& in, float* load_SN, void* stream) {
  with_per_lane(in.experts, [&](auto per_lane) {
    const auto kernel = forward_kernel<decltype(per_lane)::value>;
    LAUNCH(kernel, dim3(unsigned(num_slices(in.tokens))), dim3(threads), 0, stream)(in, load_SN);
  });
}

void noisy_load_backward(const NoisyRows& in, const float* dload_N, float* dlogits_TN, float* dnoisy_TN, float* dsigma_TN, void* stream) {
  with_per_lane(in.experts, [&](auto per_lane) {
    const auto kernel = backward_kernel<decltype(per_lane)::value>;
    LAUNCH(kernel, dim3(unsigned(num_slices(in.tokens))), dim3(threads), 0, stream)(in, dload_N, dlogits_TN, dnoisy_TN, dsigma_TN);
  });
}

}  // namespace kernels
