// A warp takes one row.
#include <cmath>

#include "op.h"

#include "../../include/cuda_portable.h"

namespace kernels {
namespace {

constexpr int threads = 128;

template <class T>
__global__ void __launch_bounds__(threads) forward_kernel(SegmentMerge in, T* out, Wide<T>* lse) {
  using Real = Wide<T>;
  const int64_t row = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (row >= in.rows) return;
  const Weights<Real> weights(static_cast<const Real*>(in.lse_a)[row], static_cast<const Real*>(in.lse_b)[row]);
  const T *const a = static_cast<const T*>(in.out_a) + row * in.size, *const b = static_cast<const T*>(in.out_b) + row * in.size;
  for (int64_t j = threadIdx.x % 32; j < in.size; j += 32)
    out[row * in.size + j] = narrow<T>(widen(a[j]) * weights.a + widen(b[j]) * weights.b);
  if (threadIdx.x % 32 == 0) lse[row] = weights.lse;
}

template <class T>
__global__ void __launch_bounds__(threads)
    backward_kernel(SegmentMerge in, const T* dout, const Wide<T>* dlse, T* dout_a, Wide<T>* dlse_a, T* dout_b, Wide<T>* dlse_b) {
  using Real = Wide<T>;
  const int64_t row = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (row >= in.rows) return;  // the whole warp
  const Weights<Real> weights(static_cast<const Real*>(in.lse_a)[row], static_cast<const Real*>(in.lse_b)[row]);
  const T *const a = static_cast<const T*>(in.out_a) + row * in.size, *const b = static_cast<const T*>(in.out_b) + row * in.size;
  Real apart = 0;
  for (int64_t j = threadIdx.x % 32; j < in.size; j += 32) {
    const Real gradient = widen(dout[row * in.size + j]);
    apart += gradient * (widen(a[j]) - widen(b[j]));
    dout_a[row * in.size + j] = narrow<T>(gradient * weights.a);
    dout_b[row * in.size + j] = narrow<T>(gradient * weights.b);
  }
  for (int distance = 16; distance > 0; distance /= 2) apart += __shfl_xor_sync(whole_warp, apart, distance);
  if (threadIdx.x % 32) return;
  const Real moved = weights.a * weights.b * apart;
  dlse_a[row] = moved + weights.a * dlse[row];
  dlse_b[row] = weights.b * dlse[row] - moved;
}

dim3 blocks(int64_t rows) { return dim3(unsigned((rows + threads / 32 - 1) / (threads / 32))); }

}  // namespace

void segment_merge_forward(const SegmentMerge& in, void* out, void* lse, void* stream) {
  if (in.rows == 0) return;
  const auto run = [&](auto one) {
    using T = decltype(one);
    const auto kernel = forward_kernel<T>;
    LAUNCH(kernel, blocks(in.rows), dim3(threads), 0, stream)(in, static_cast<T*>(out), static_cast<Wide<T>*>(lse));
  };
  with_type(in.type, run);
}

void segment_merge_backward(const SegmentMerge& in, const void* dout, const void* dlse, void* dout_a, void* dlse_a, void* dout_b,
                            void* dlse_b, void* stream) {
  if (in.rows == 0) return;
  with_type(in.type, [&](auto one) {
    using T = decltype(one);
    using Real = Wide<T>;
    const auto kernel = backward_kernel<T>;
    LAUNCH(kernel, blocks(in.rows), dim3(threads), 0, stream)
    (in, static_cast<const T*>(dout), static_cast<const Real*>(dlse), static_cast<T*>(dout_a), static_cast<Real*>(dlse_a),
     static_cast<T*>(dout_b), static_cast<Real*>(dlse_b));
  });
}

}  // namespace kernels
