#include "op.h"

#include <algorithm>
#include <vector>

#include "../../include/rope_rows_torch.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace {

constexpr int64_t grain = 64;  // entries, or places, that are worth a thread

template <class T>
void forward(const RopeGather& in, const int64_t* src, const Rows& k, const Rows& v, const Rows& k_out, const Rows& v_out) {
  const size_t bytes = sizeof(T) * size_t(2 * in.half);
  torch::stable::parallel_for(0, in.batch * in.entries, grain, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const int64_t b = at / in.entries, n = at % in.entries, place = src[at], table = in.pos[at] * in.half;
      for (int64_t g = 0; g < in.heads; ++g) {
        T* const key = k_out.row<T>(b, g, n);
        T* const value = v_out.row<T>(b, g, n);
        if (place < 0) {
          memset(static_cast<void*>(key), 0, bytes);
          memset(static_cast<void*>(value), 0, bytes);
          continue;
        }
        turn_row<T>(k.row<T>(b, g, place), static_cast<const Wide<T>*>(in.cos) + table, static_cast<const Wide<T>*>(in.sin) + table, in.half, key);
        memcpy(static_cast<void*>(value), v.row<T>(b, g, place), bytes);
      }
    }
  });
}

// The inverse rotation, added.
template <class T>
void add_rotated_back(const T* __restrict__ from, const Wide<T>* __restrict__ cos, const Wide<T>* __restrict__ sin, int64_t half,
                      Wide<T>* __restrict__ sums) {
  each_lanes<T>(0, half, [&](int64_t j, int64_t present) {
    const auto of = [&](const auto* x) { return get(x + j, present, Wide<T>(0)); };
    const Lanes<T> first = of(from), second = of(from + half), c = of(cos), s = of(sin);
    put(sums + j, of(sums) + (first * c + second * s), present);
    put(sums + j + half, of(sums + half) + (second * c - first * s), present);
  });
}

template <class T>
void backward(const RopeGather& in, const int64_t* order, const int64_t* begin, const Rows& dk_out, const Rows& dv_out, const Rows& dk,
              const Rows& dv) {
  const int64_t width = 2 * in.half;
  torch::stable::parallel_for(0, in.batch * in.length, grain, [&](int64_t first, int64_t last) {
    std::vector<Wide<T>> keys(static_cast<size_t>(width)), values(static_cast<size_t>(width));
    for (int64_t at = first; at < last; ++at) {
      const int64_t b = at / in.length, t = at % in.length, from = begin[at + b], to = begin[at + b + 1];
      for (int64_t g = 0; g < in.heads; ++g) {
        std::fill(keys.begin(), keys.end(), Wide<T>(0));
        std::fill(values.begin(), values.end(), Wide<T>(0));
        for (int64_t i = from; i < to; ++i) {
          const int64_t n = order[b * in.entries + i], table = in.pos[b * in.entries + n] * in.half;
          add_rotated_back<T>(dk_out.row<T>(b, g, n), static_cast<const Wide<T>*>(in.cos) + table,
                              static_cast<const Wide<T>*>(in.sin) + table, in.half, keys.data());
          const T* const value = dv_out.row<T>(b, g, n);
          each_lanes<T>(0, width, [&](int64_t j, int64_t present) {
            put(values.data() + j, get(values.data() + j, present, Wide<T>(0)) + get(value + j, present, Wide<T>(0)), present);
          });
        }
        T* const key = dk.row<T>(b, g, t);
        T* const value = dv.row<T>(b, g, t);
        each_lanes<T>(0, width, [&](int64_t j, int64_t present) {
          put(key + j, get(keys.data() + j, present, Wide<T>(0)), present);
          put(value + j, get(values.data() + j, present, Wide<T>(0)), present);
        });
      }
    }
  });
}

}  // namespace

void rope_gather_forward(const RopeGather& in, const int64_t* src, const Rows& k, const Rows& v, const Rows& k_out, const Rows& v_out, void*) {
  with_type(in.type, [&](auto one) { forward<decltype(one)>(in, src, k, v, k_out, v_out); });
}

void rope_gather_backward(const RopeGather& in, const int64_t* order, const int64_t* begin, const Rows& dk_out, const Rows& dv_out,
                          const Rows& dk, const Rows& dv, void*) {
  with_type(in.type, [&](auto one) { backward<decltype(one)>(in, order, begin, dk_out, dv_out, dk, dv); });
}
#endif

namespace {

RopeGather inputs(const Tensor& k, int64_t length, const Tensor& pos, const Tensor& cos, const Tensor& sin) {
  return {float_type(k),  k.size(0),   k.size(1),      length,        pos.size(1), k.size(3) / 2,
          cos.size(0), pointer_to<int64_t>(pos), cos.data_ptr(), sin.data_ptr()};
}

void forward_op(const Tensor k, const Tensor v, const Tensor src, const Tensor pos, const Tensor cos, const Tensor sin, Tensor k_out,
                Tensor v_out) {
  const Stream stream(k);
  rope_gather_forward(inputs(k, k.size(2), pos, cos, sin), pointer_to<int64_t>(src), rows(k), rows(v), rows(k_out), rows(v_out), stream.handle);
}

void backward_op(const Tensor dk_out, const Tensor dv_out, const Tensor order, const Tensor begin, const Tensor pos, const Tensor cos,
                 const Tensor sin, Tensor dk, Tensor dv) {
  const Stream stream(dk);
  rope_gather_backward(inputs(dk, dk.size(2), pos, cos, sin), pointer_to<int64_t>(order), pointer_to<int64_t>(begin), rows(dk_out),
                       rows(dv_out), rows(dk), rows(dv), stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(beacon, library) {
  library.impl("rope_gather_forward_", TORCH_BOX(&kernels::forward_op));
  library.impl("rope_gather_backward_", TORCH_BOX(&kernels::backward_op));
}
