// Rows of logits of up to 256 experts on a GPU: a warp takes a token, and lane i holds experts i, i + 32, ...
#pragma once
#include "cuda_portable.h"
#include "ranking.h"
#include "token_slices.h"

namespace kernels {

// A block takes one slice of tokens.
constexpr int ranking_warps = 8;

template <int per_lane>
struct Ranked {
  int rank[per_lane];  // of this lane's experts among the first ones, or -1
  float value;         // of rank `lane`
  int index;

  // The `count` first experts of a row, by all lanes of a warp.
  __device__ __forceinline__ void find(const float* row, int experts, int count) {
    const int lane = int(threadIdx.x % 32);
    uint64_t keys[per_lane];
#pragma unroll
    for (int n = 0; n < per_lane; ++n) {
      keys[n] = lane + 32 * n < experts ? rank_key(row[lane + 32 * n], uint32_t(lane + 32 * n)) : 0;
      rank[n] = -1;
    }
    value = 0.0f;
    index = 0;
    for (int place = 0; place < count; ++place) {
      uint64_t first = 0;
#pragma unroll
      for (int n = 0; n < per_lane; ++n) first = keys[n] > first ? keys[n] : first;
      for (int distance = 16; distance > 0; distance /= 2) {
        const uint64_t other = __shfl_xor_sync(whole_warp, first, distance);
        first = other > first ? other : first;
      }
#pragma unroll
      for (int n = 0; n < per_lane; ++n)
        if (keys[n] == first) {
          rank[n] = place;
          keys[n] = 0;
        }
      if (lane == place) {
        value = value_of_key(first);
        index = expert_of_key(first);
      }
    }
  }
};

// out[experts] <- the warps' sums, added in order. `mine` holds this lane's experts; `shared` has room for all warps and experts.
template <int per_lane, class T>
__device__ __forceinline__ void add_warps(const T (&mine)[per_lane], T* shared, T* out, int experts) {
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
#pragma unroll
  for (int n = 0; n < per_lane; ++n) shared[warp * 32 * per_lane + lane + 32 * n] = mine[n];
  __syncthreads();
  for (int j = int(threadIdx.x); j < experts; j += 32 * ranking_warps) {
    T total = shared[j];
    for (int w = 1; w < ranking_warps; ++w) total += shared[w * 32 * per_lane + j];
    out[j] = total;
  }
}

// Calls run(number of experts that a lane holds).
template <class Run>
void with_per_lane(int64_t experts, Run run) {
  if (experts <= 32)
    run(std::integral_constant<int, 1>{});
  else if (experts <= 64)
    run(std::integral_constant<int, 2>{});
  else if (experts <= 128)
    run(std::integral_constant<int, 4>{});
  else
    run(std::integral_constant<int, 8>{});
}

}  // namespace kernels
