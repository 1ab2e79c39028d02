#include "../../include/cuda_portable.h"
#include "op.h"

namespace kernels {
namespace {

constexpr int columns = 32, token_lanes = 8;  // threads of a block

// A block takes a slice of tokens and some columns; a thread every `token_lanes`th token of one column.
struct Place {
  int64_t slice, column, first, end;
  __device__ __forceinline__ explicit Place(const Shift& in)
      : slice(blockIdx.y),
        column(int64_t(blockIdx.x) * columns + threadIdx.x % columns),
        first(slice * slice_tokens + threadIdx.x / columns),
        end(column < in.width ? slice_end(slice, in.tokens()) : 0) {}
};

template <class T>
__device__ __forceinline__ float before(const Shift& in, int64_t token, int64_t source, int64_t column) {
  const int64_t row = token / in.time;
  if (source >= 0) return widen(static_cast<const T*>(in.h)[(row * in.time + source) * in.width + column]);
  return source == Shift::from_prev && in.prev ? widen(static_cast<const T*>(in.prev)[row * in.width + column]) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(columns * token_lanes) forward_kernel(Shift in, T* out) {
  const Place at(in);
  float mu[max_mixes];
#pragma unroll
  for (int mix = 0; mix < max_mixes; ++mix) mu[mix] = mix < in.mixes && at.end ? in.mus[mix * in.width + at.column] : 0.0f;
  for (int64_t token = at.first; token < at.end; token += token_lanes) {
    const int64_t source = in.source_of(token);
    const bool counts = source != Shift::padding;
    // padding may hold anything
    const float own = counts ? widen(static_cast<const T*>(in.h)[token * in.width + at.column]) : 0.0f;
    const float distance = counts ? before<T>(in, token, source, at.column) - own : 0.0f;
#pragma unroll
    for (int mix = 0; mix < max_mixes; ++mix)
      if (mix < in.mixes) out[(mix * in.tokens() + token) * in.width + at.column] = narrow<T>(own + distance * mu[mix]);
  }
}

template <class T>
__global__ void __launch_bounds__(columns * token_lanes) backward_kernel(Shift in, const T* dout, T* dh, T* dprev, float* partial) {
  SHARED(float, sums_of_lane, max_mixes * token_lanes * columns);
  const Place at(in);
  const int64_t tokens = in.tokens();
  float mu[max_mixes], sums[max_mixes];
#pragma unroll
  for (int mix = 0; mix < max_mixes; ++mix) {
    mu[mix] = mix < in.mixes && at.end ? in.mus[mix * in.width + at.column] : 0.0f;
    sums[mix] = 0;
  }
  for (int64_t token = at.first; token < at.end; token += token_lanes) {
    const int64_t row = token / in.time, source = in.source_of(token), successor = in.successor_of(token);
    const auto gradient_of = [&](int mix, int64_t of) { return widen(dout[(mix * tokens + of) * in.width + at.column]); };
    float result = 0, to_prev = 0;
    if (source != Shift::padding) {
      const float distance = before<T>(in, token, source, at.column) - widen(static_cast<const T*>(in.h)[token * in.width + at.column]);
#pragma unroll
      for (int mix = 0; mix < max_mixes; ++mix) {
        if (mix >= in.mixes) continue;
        const float gradient = gradient_of(mix, token), moved = gradient * mu[mix];
        result += gradient - moved;
        to_prev += moved;
        sums[mix] += gradient * distance;
        if (successor >= 0) result += gradient_of(mix, row * in.time + successor) * mu[mix];
      }
      if (source == Shift::from_prev && dprev) dprev[row * in.width + at.column] = narrow<T>(to_prev);
    }
    dh[token * in.width + at.column] = narrow<T>(result);
  }
#pragma unroll
  for (int mix = 0; mix < max_mixes; ++mix) sums_of_lane[mix * token_lanes * columns + threadIdx.x] = sums[mix];
  __syncthreads();
  if (at.end && threadIdx.x < columns) {
    for (int mix = 0; mix < in.mixes; ++mix) {
      float total = 0;
      for (int lane = 0; lane < token_lanes; ++lane) total += sums_of_lane[(mix * token_lanes + lane) * columns + threadIdx.x];
      partial[(at.slice * in.mixes + mix) * in.width + at.column] = total;
    }
  }
}

dim3 blocks(const Shift& in) { return dim3(unsigned((in.width + columns - 1) / columns), unsigned(num_slices(in.tokens()))); }

}  // namespace

void tmix_shift_forward(const Shift& in, void* out, void* stream) {
  if (in.tokens() * in.width == 0) return;
  const auto launch = [&](auto one) {
    using T = decltype(one);
    const auto kernel = forward_kernel<T>;
    LAUNCH(kernel, blocks(in), dim3(columns * token_lanes), 0, stream)(in, static_cast<T*>(out));
  };
  in.type == Float::float32 ? launch(float{}) : launch(bfloat16{});
}

void tmix_shift_backward(const Shift& in, const void* dout, void* dh, void* dprev, float* partial, void* stream) {
  if (in.tokens() * in.width == 0) return;
  const auto launch = [&](auto one) {
    using T = decltype(one);
    const auto kernel = backward_kernel<T>;
    LAUNCH(kernel, blocks(in), dim3(columns * token_lanes), 0, stream)
    (in, static_cast<const T*>(dout), static_cast<T*>(dh), static_cast<T*>(dprev), partial);
  };
  in.type == Float::float32 ? launch(float{}) : launch(bfloat16{});
}

}  // namespace kernels
