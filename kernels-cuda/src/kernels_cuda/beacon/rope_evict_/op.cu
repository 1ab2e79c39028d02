// A block takes 32 pairs of columns of one head. Entries move in waves of `count`, which neither read nor write what the others of
// their wave do; between two waves the block waits.
#include "op.h"

#include "../../include/cuda_portable.h"

namespace kernels {
namespace {

constexpr int columns = 32, lanes = 8;

template <class T>
__global__ void __launch_bounds__(columns * lanes) evict_kernel(RopeEvict in) {
  const int64_t b = blockIdx.x / in.heads, g = blockIdx.x % in.heads, count = in.count[b];
  const int64_t j = int64_t(blockIdx.y) * columns + threadIdx.x % columns;
  if (count == 0) return;  // the whole block
  const bool present = j < in.half;
  const Wide<T> cos = present ? in.cosine<T>(b, j) : Wide<T>(0), sin = present ? in.sine<T>(b, j) : Wide<T>(0);
  const int64_t end = in.length[b] - count;
  for (int64_t wave = in.first[b]; wave < end; wave += count) {
    const int64_t wave_end = wave + count < end ? wave + count : end;
    for (int64_t n = wave + threadIdx.x / columns; present && n < wave_end; n += lanes) {
      const T* const key = in.k.row<T>(b, g, n + count);
      const T* const value = in.v.row<T>(b, g, n + count);
      T* const key_to = in.k.row<T>(b, g, n);
      T* const value_to = in.v.row<T>(b, g, n);
      const Turned<T> turned(key[j], key[j + in.half], cos, sin);
      key_to[j] = turned.first;
      key_to[j + in.half] = turned.second;
      value_to[j] = value[j];
      value_to[j + in.half] = value[j + in.half];
    }
    __syncthreads();
  }
}

}  // namespace

void rope_evict(const RopeEvict& in, void* stream) {
  if (in.batch * in.heads * in.half == 0) return;
  const dim3 blocks(unsigned(in.batch * in.heads), unsigned((in.half + columns - 1) / columns));
  with_type(in.type, [&](auto one) {
    const auto kernel = evict_kernel<decltype(one)>;
    LAUNCH(kernel, blocks, dim3(columns * lanes), 0, stream)(in);
  });
}

}  // namespace kernels
