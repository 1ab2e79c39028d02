#include "op.h"

#include "../../include/rope_rows_torch.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace {

template <class T>
void append(const RopeAppend& in) {
  torch::stable::parallel_for(0, in.batch * in.entries, 64, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const int64_t b = at / in.entries, place = in.place[at], table = place * in.half;
      if (place < 0) continue;
      for (int64_t g = 0; g < in.heads; ++g) {
        turn_row<T>(in.k.row<T>(b, g, in.src[at]), static_cast<const Wide<T>*>(in.cos) + table,
                    static_cast<const Wide<T>*>(in.sin) + table, in.half, in.k_mem.row<T>(b, g, place));
        memcpy(static_cast<void*>(in.v_mem.row<T>(b, g, place)), in.v.row<T>(b, g, in.src[at]), sizeof(T) * size_t(2 * in.half));
      }
    }
  });
}

}  // namespace

void rope_gather_append(const RopeAppend& in, void*) {
  with_type(in.type, [&](auto one) { append<decltype(one)>(in); });
}
#endif

namespace {

void append_op(const Tensor k, const Tensor v, const Tensor src, const Tensor place, const Tensor cos, const Tensor sin, Tensor k_mem,
               Tensor v_mem) {
  const Stream stream(k);
  rope_gather_append({float_type(k), k.size(0), k.size(1), src.size(1), k.size(3) / 2, pointer_to<int64_t>(src), pointer_to<int64_t>(place),
                      cos.data_ptr(), sin.data_ptr(), rows(k), rows(v), rows(k_mem), rows(v_mem)},
                     stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(beacon, library) { library.impl("rope_gather_append_", TORCH_BOX(&kernels::append_op)); }
