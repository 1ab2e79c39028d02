// A thread takes one pair (j, j + half) of one entry: neighbours read and write neighbouring numbers.
#include "op.h"

#include "../../include/cuda_portable.h"

namespace kernels {
namespace {

constexpr int threads = 256;

template <class T>
__global__ void __launch_bounds__(threads) append_kernel(RopeAppend in) {
  const int64_t number = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (number >= in.batch * in.heads * in.entries * in.half) return;
  const int64_t j = number % in.half, n = number / in.half % in.entries, g = number / in.half / in.entries % in.heads;
  const int64_t b = number / in.half / in.entries / in.heads, at = b * in.entries + n, place = in.place[at];
  if (place < 0) return;
  const T* const key = in.k.row<T>(b, g, in.src[at]);
  const T* const value = in.v.row<T>(b, g, in.src[at]);
  T* const key_to = in.k_mem.row<T>(b, g, place);
  T* const value_to = in.v_mem.row<T>(b, g, place);
  const int64_t angle = place * in.half + j;
  const Turned<T> turned(key[j], key[j + in.half], static_cast<const Wide<T>*>(in.cos)[angle], static_cast<const Wide<T>*>(in.sin)[angle]);
  key_to[j] = turned.first;
  key_to[j + in.half] = turned.second;
  value_to[j] = value[j];
  value_to[j + in.half] = value[j + in.half];
}

}  // namespace

void rope_gather_append(const RopeAppend& in, void* stream) {
  const int64_t pairs = in.batch * in.heads * in.entries * in.half;
  if (pairs == 0) return;
  with_type(in.type, [&](auto one) {
    const auto kernel = append_kernel<decltype(one)>;
    LAUNCH(kernel, dim3(unsigned((pairs + threads - 1) / threads)), dim3(threads), 0, stream)(in);
  });
}

}  // namespace kernels
