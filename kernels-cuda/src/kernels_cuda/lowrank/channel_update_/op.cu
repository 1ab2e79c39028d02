// The norm takes a block of threads for each row; the write eight elements for each thread, 16 random bits each.
#include "op.h"

#include <cmath>

#include "../../include/weights_cuda.h"

namespace kernels {
namespace {

constexpr int threads = 256;

template <class G>
__global__ void __launch_bounds__(threads) squares_kernel(Channels in, float* sums) {
  SHARED(float, partial, threads);
  const int64_t row = blockIdx.x;
  const G* gradient = static_cast<const G*>(in.gradient) + row * in.columns;
  float sum = 0;
  for (int64_t column = threadIdx.x; column < in.columns; column += threads) {
    const float value = widen(gradient[column]) * in.of(row, column);
    sum = fmaf(value, value, sum);
  }
  partial[threadIdx.x] = sum;
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[row] = partial[0];
}

template <class W, class G>
__global__ void __launch_bounds__(write_threads) write_kernel(Write in, Channels channels) {
  write_eight<W>(in, [&](int64_t i) {
    const float back = !in.back                    ? 0
                       : in.type == Float::float32 ? static_cast<const float*>(in.back)[i]
                                                   : widen(static_cast<const bfloat16*>(in.back)[i]);
    return fmaf(channels.of(i / channels.columns, i % channels.columns), widen(static_cast<const G*>(channels.gradient)[i]), back);
  });
}

template <class W>
auto write_for(Float gradient) {
  return gradient == Float::float32 ? write_kernel<W, float> : write_kernel<W, bfloat16>;
}

}  // namespace

void channel_squares(const Channels& in, float* sums, int64_t rows, void* stream) {
  const auto kernel = in.type == Float::float32 ? squares_kernel<float> : squares_kernel<bfloat16>;
  LAUNCH(kernel, dim3(unsigned(rows)), dim3(threads), 0, stream)(in, sums);
}

void channel_write(const Write& in, const Channels& channels, void* stream) {
  const auto kernel = in.weight_type == Float::float32 ? write_for<float>(channels.type) : write_for<bfloat16>(channels.type);
  LAUNCH(kernel, write_blocks(in), dim3(write_threads), 0, stream)(in, channels);
}

}  // namespace kernels
