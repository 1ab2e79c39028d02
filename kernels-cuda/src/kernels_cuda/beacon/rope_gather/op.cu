// A thread takes one pair (j, j + half) of one entry, or of one place in the backward pass: neighbours read and write neighbouring numbers.
#include "op.h"

#include "../../include/cuda_portable.h"

namespace kernels {
namespace {

constexpr int threads = 256;

// Pair `number` of [batch][heads][count][half].
struct Pair {
  int64_t b, g, n, j;
  __device__ __forceinline__ Pair(const RopeGather& in, int64_t count, int64_t number)
      : b(number / in.half / count / in.heads), g(number / in.half / count % in.heads), n(number / in.half % count), j(number % in.half) {}
};

template <class T>
__global__ void __launch_bounds__(threads) forward_kernel(RopeGather in, const int64_t* src, Rows k, Rows v, Rows k_out, Rows v_out) {
  const int64_t number = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (number >= in.batch * in.heads * in.entries * in.half) return;
  const Pair at(in, in.entries, number);
  const int64_t place = src[at.b * in.entries + at.n], position = in.pos[at.b * in.entries + at.n];
  T* const key = k_out.row<T>(at.b, at.g, at.n);
  T* const value = v_out.row<T>(at.b, at.g, at.n);
  // nobody looked at indices on the host: a wrong one shows
  const bool wrong = place >= in.length || position < 0 || position >= in.positions;
  if (place < 0 || wrong) {
    const T nothing = narrow<T>(wrong ? Wide<T>(NAN) : Wide<T>(0));
    key[at.j] = key[at.j + in.half] = value[at.j] = value[at.j + in.half] = nothing;
    return;
  }
  const T* const from = k.row<T>(at.b, at.g, place);
  const T* const values = v.row<T>(at.b, at.g, place);
  const Wide<T> cos = static_cast<const Wide<T>*>(in.cos)[position * in.half + at.j];
  const Wide<T> sin = static_cast<const Wide<T>*>(in.sin)[position * in.half + at.j];
  const Turned<T> turned(from[at.j], from[at.j + in.half], cos, sin);
  key[at.j] = turned.first;
  key[at.j + in.half] = turned.second;
  value[at.j] = values[at.j];
  value[at.j + in.half] = values[at.j + in.half];
}

template <class T>
__global__ void __launch_bounds__(threads)
    backward_kernel(RopeGather in, const int64_t* order, const int64_t* begin, Rows dk_out, Rows dv_out, Rows dk, Rows dv) {
  const int64_t number = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (number >= in.batch * in.heads * in.length * in.half) return;
  const Pair at(in, in.length, number);
  Wide<T> keys[2] = {0, 0}, values[2] = {0, 0};
  const int64_t* const range = begin + at.b * (in.length + 1) + at.n;
  for (int64_t i = range[0]; i < range[1]; ++i) {
    const int64_t n = order[at.b * in.entries + i], position = in.pos[at.b * in.entries + n];
    if (position < 0 || position >= in.positions) continue;
    const Wide<T> cos = static_cast<const Wide<T>*>(in.cos)[position * in.half + at.j];
    const Wide<T> sin = static_cast<const Wide<T>*>(in.sin)[position * in.half + at.j];
    const T* const key = dk_out.row<T>(at.b, at.g, n);
    const T* const value = dv_out.row<T>(at.b, at.g, n);
    const Wide<T> first = widen(key[at.j]), second = widen(key[at.j + in.half]);
    keys[0] += first * cos + second * sin;
    keys[1] += second * cos - first * sin;
    values[0] += widen(value[at.j]);
    values[1] += widen(value[at.j + in.half]);
  }
  for (int i = 0; i < 2; ++i) {
    dk.row<T>(at.b, at.g, at.n)[at.j + i * in.half] = narrow<T>(keys[i]);
    dv.row<T>(at.b, at.g, at.n)[at.j + i * in.half] = narrow<T>(values[i]);
  }
}

dim3 blocks(int64_t pairs) { return dim3(unsigned((pairs + threads - 1) / threads)); }

}  // namespace

void rope_gather_forward(const RopeGather& in, const int64_t* src, const Rows& k, const Rows& v, const Rows& k_out, const Rows& v_out,
                         void* stream) {
  const int64_t pairs = in.batch * in.heads * in.entries * in.half;
  if (pairs == 0) return;
  with_type(in.type, [&](auto one) {
    const auto kernel = forward_kernel<decltype(one)>;
    LAUNCH(kernel, blocks(pairs), dim3(threads), 0, stream)(in, src, k, v, k_out, v_out);
  });
}

void rope_gather_backward(const RopeGather& in, const int64_t* order, const int64_t* begin, const Rows& dk_out, const Rows& dv_out,
                          const Rows& dk, const Rows& dv, void* stream) {
  const int64_t pairs = in.batch * in.heads * in.length * in.half;
  if (pairs == 0) return;
  with_type(in.type, [&](auto one) {
    const auto kernel = backward_kernel<decltype(one)>;
    LAUNCH(kernel, blocks(pairs), dim3(threads), 0, stream)(in, order, begin, dk_out, dv_out, dk, dv);
  });
}

}  // namespace kernels
