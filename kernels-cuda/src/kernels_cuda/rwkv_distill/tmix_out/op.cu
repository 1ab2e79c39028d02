// A warp takes one head of one token at a time; a lane holds up to eight of its values.
#include <cmath>

#include "../../include/cuda_portable.h"
#include "op.h"

namespace kernels {
namespace {

constexpr int num_warps = 8, per_lane = max_head_size / 32;

__device__ __forceinline__ float warp_sum(float mine) {
  for (int distance = 16; distance > 0; distance /= 2) mine += __shfl_xor_sync(whole_warp, mine, distance);
  return mine;
}

template <class T>
struct HeadOf {
  const Output& in;
  int64_t token, head;
  int lane;
  float y[per_lane], r[per_lane], k[per_lane], v[per_lane];
  float normalised[per_lane];
  float scale, bonus;

  __device__ __forceinline__ HeadOf(const Output& in, int64_t token, int64_t head)
      : in(in), token(token), head(head), lane(int(threadIdx.x) % 32), scale(0), bonus(0) {
    load(in.y, y);
    if (in.bonus) {
      load(in.r, r);
      load(in.k, k);
      load(in.v, v);
      float mine = 0;
      each([&](int i, int column) { mine += r[i] * k[i] * in.bonus[parameter(column)]; });
      bonus = warp_sum(mine);
    }
    if (in.weight) {
      float mine = 0;
      each([&](int i, int) { mine += y[i]; });
      const float mean = warp_sum(mine) / float(in.size);
      mine = 0;
      each([&](int i, int) { mine += (y[i] - mean) * (y[i] - mean); });
      scale = 1.0f / sqrtf(warp_sum(mine) / float(in.size) + in.eps);
      each([&](int i, int) { normalised[i] = (y[i] - mean) * scale; });
    }
  }

  // Calls visit(number in the lane, column) for the values of this lane.
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll
    for (int i = 0; i < per_lane; ++i)
      if (i * 32 + lane < in.size) visit(i, i * 32 + lane);
  }
  __device__ __forceinline__ int64_t place(int column) const { return (token * in.heads + head) * in.size + column; }
  __device__ __forceinline__ int64_t parameter(int column) const { return head * in.size + column; }
  __device__ __forceinline__ void load(const void* from, float* to) const {
    each([&](int i, int column) { to[i] = widen(static_cast<const T*>(from)[place(column)]); });
  }
  __device__ __forceinline__ void put(void* to, int column, float value) const {
    static_cast<T*>(to)[place(column)] = narrow<T>(value);
  }
  // Before the gate.
  __device__ __forceinline__ float stage(int i, int column) const {
    float result = in.weight ? normalised[i] * in.weight[parameter(column)] + in.bias[parameter(column)] : y[i];
    if (in.bonus) result += v[i] * bonus;
    return result;
  }
};

template <class T>
__global__ void __launch_bounds__(32 * num_warps) forward_kernel(Output in, void* out) {
  const int64_t number = int64_t(blockIdx.x) * num_warps + threadIdx.x / 32;
  if (number >= in.tokens * in.heads) return;
  const HeadOf<T> at(in, number / in.heads, number % in.heads);
  at.each([&](int i, int column) {
    const float gate = in.gate ? widen(static_cast<const T*>(in.gate)[at.place(column)]) : 1.0f;
    at.put(out, column, at.stage(i, column) * gate);
  });
}

// A block takes one head of a slice of tokens, a warp every num_warps-th of them.
template <class T>
__global__ void __launch_bounds__(32 * num_warps) backward_kernel(Output in, const void* dout, OutputGradients out) {
  SHARED(float, sums_of_warp, num_warps * max_head_size);
  const int64_t slice = blockIdx.y, head = blockIdx.x;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  float dbonus_sum[per_lane], dweight[per_lane], dbias[per_lane];
#pragma unroll
  for (int i = 0; i < per_lane; ++i) dbonus_sum[i] = dweight[i] = dbias[i] = 0;
  for (int64_t token = slice * slice_tokens + warp; token < slice_end(slice, in.tokens); token += num_warps) {
    const HeadOf<T> at(in, token, head);
    float dstage[per_lane];
    at.load(dout, dstage);
    at.each([&](int i, int column) {
      if (!in.gate) return;
      at.put(out.gate, column, dstage[i] * at.stage(i, column));
      dstage[i] *= widen(static_cast<const T*>(in.gate)[at.place(column)]);
    });
    if (in.bonus) {
      float mine = 0;
      at.each([&](int i, int) { mine += dstage[i] * at.v[i]; });
      const float dbonus = warp_sum(mine);
      at.each([&](int i, int column) {
        const float by = in.bonus[at.parameter(column)];
        at.put(out.v, column, dstage[i] * at.bonus);
        at.put(out.r, column, at.k[i] * by * dbonus);
        at.put(out.k, column, at.r[i] * by * dbonus);
        dbonus_sum[i] += at.r[i] * at.k[i] * dbonus;
      });
    }
    if (in.weight) {
      float mine = 0, mine_along = 0;
      at.each([&](int i, int column) {
        const float gradient = dstage[i] * in.weight[at.parameter(column)];
        mine += gradient;
        mine_along += gradient * at.normalised[i];
      });
      const float mean = warp_sum(mine) / float(in.size), along = warp_sum(mine_along) / float(in.size);
      at.each([&](int i, int column) {
        dweight[i] += dstage[i] * at.normalised[i];
        dbias[i] += dstage[i];
        at.put(out.y, column, (dstage[i] * in.weight[at.parameter(column)] - mean - at.normalised[i] * along) * at.scale);
      });
    } else {
      at.each([&](int i, int column) { at.put(out.y, column, dstage[i]); });
    }
  }
  const auto put_sums = [&](int which, const float* sums) {
    __syncthreads();  // the sums before are still read
#pragma unroll
    for (int i = 0; i < per_lane; ++i) sums_of_warp[warp * max_head_size + i * 32 + lane] = sums[i];
    __syncthreads();
    if (int64_t(threadIdx.x) < in.size) {
      float total = 0;
      for (int from = 0; from < num_warps; ++from) total += sums_of_warp[from * max_head_size + threadIdx.x];
      out.partial[((slice * 3 + which) * in.heads + head) * in.size + threadIdx.x] = total;
    }
  };
  put_sums(0, dbonus_sum);
  put_sums(1, dweight);
  put_sums(2, dbias);
}
static_assert(32 * num_warps >= max_head_size, "a thread for each column of a sum");

}  // namespace

void tmix_out_forward(const Output& in, void* out, void* stream) {
  const int64_t number = in.tokens * in.heads;
  if (number * in.size == 0) return;
  const auto kernel = in.type == Float::float32 ? forward_kernel<float> : forward_kernel<bfloat16>;
  LAUNCH(kernel, dim3(unsigned((number + num_warps - 1) / num_warps)), dim3(32 * num_warps), 0, stream)(in, out);
}

void tmix_out_backward(const Output& in, const void* dout, const OutputGradients& out, void* stream) {
  if (in.tokens * in.heads * in.size == 0) return;
  const auto kernel = in.type == Float::float32 ? backward_kernel<float> : backward_kernel<bfloat16>;
  LAUNCH(kernel, dim3(unsigned(in.heads), unsigned(num_slices(in.tokens))), dim3(32 * num_warps), 0, stream)(in, dout, out);
}

}  // namespace kernels
