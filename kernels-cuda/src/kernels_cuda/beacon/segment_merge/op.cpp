#include <cmath>

#include "op.h"

#include "../../include/registration.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace {

template <class T>
struct Row {
  const T *a, *b;
  Weights<Wide<T>> weights;

  Row(const SegmentMerge& in, int64_t row)
      : a(static_cast<const T*>(in.out_a) + row * in.size),
        b(static_cast<const T*>(in.out_b) + row * in.size),
        weights(static_cast<const Wide<T>*>(in.lse_a)[row], static_cast<const Wide<T>*>(in.lse_b)[row]) {}
};

}  // namespace

void segment_merge_forward(const SegmentMerge& in, void* out, void* lse, void*) {
  with_type(in.type, [&](auto one) {
    using T = decltype(one);
    torch::stable::parallel_for(0, in.rows, 64, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const Row<T> at(in, row);
        T* const to = static_cast<T*>(out) + row * in.size;
        for (int64_t j = 0; j < in.size; ++j) to[j] = narrow<T>(widen(at.a[j]) * at.weights.a + widen(at.b[j]) * at.weights.b);
        static_cast<Wide<T>*>(lse)[row] = at.weights.lse;
      }
    });
  });
}

void segment_merge_backward(const SegmentMerge& in, const void* dout, const void* dlse, void* dout_a, void* dlse_a, void* dout_b,
                            void* dlse_b, void*) {
  with_type(in.type, [&](auto one) {
    using T = decltype(one);
    torch::stable::parallel_for(0, in.rows, 64, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const Row<T> at(in, row);
        const T* const from = static_cast<const T*>(dout) + row * in.size;
        T *const to_a = static_cast<T*>(dout_a) + row * in.size, *const to_b = static_cast<T*>(dout_b) + row * in.size;
        Wide<T> apart = 0;
        for (int64_t j = 0; j < in.size; ++j) {
          const Wide<T> gradient = widen(from[j]);
          apart += gradient * (widen(at.a[j]) - widen(at.b[j]));
          to_a[j] = narrow<T>(gradient * at.weights.a);
          to_b[j] = narrow<T>(gradient * at.weights.b);
        }
        const Wide<T> own = static_cast<const Wide<T>*>(dlse)[row], moved = at.weights.a * at.weights.b * apart;
        static_cast<Wide<T>*>(dlse_a)[row] = moved + at.weights.a * own;
        static_cast<Wide<T>*>(dlse_b)[row] = at.weights.b * own - moved;
      }
    });
  });
}
#endif

namespace {

SegmentMerge inputs(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b) {
  return {float_type(out_a), lse_a.size(0), out_a.size(1), out_a.data_ptr(), lse_a.data_ptr(), out_b.data_ptr(), lse_b.data_ptr()};
}

void forward_op(const Tensor out_a, const Tensor lse_a, const Tensor out_b, const Tensor lse_b, Tensor out, Tensor lse) {
  const Stream stream(out_a);
  segment_merge_forward(inputs(out_a, lse_a, out_b, lse_b), out.data_ptr(), lse.data_ptr(), stream.handle);
}

void backward_op(const Tensor dout, const Tensor dlse, const Tensor out_a, const Tensor lse_a, const Tensor out_b, const Tensor lse_b,
                 Tensor dout_a, Tensor dlse_a, Tensor dout_b, Tensor dlse_b) {
  const Stream stream(out_a);
  segment_merge_backward(inputs(out_a, lse_a, out_b, lse_b), dout.data_ptr(), dlse.data_ptr(), dout_a.data_ptr(), dlse_a.data_ptr(),
                         dout_b.data_ptr(), dlse_b.data_ptr(), stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(beacon, library) {
  library.impl("segment_merge_forward_", TORCH_BOX(&kernels::forward_op));
  library.impl("segment_merge_backward_", TORCH_BOX(&kernels::backward_op));
}
