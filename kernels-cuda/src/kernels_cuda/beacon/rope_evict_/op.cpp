#include "op.h"

#include <vector>

#include "../../include/rope_rows_torch.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace {

template <class T>
void evict(const RopeEvict& in) {
  torch::stable::parallel_for(0, in.batch * in.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<Wide<T>> cos(static_cast<size_t>(in.half)), sin(static_cast<size_t>(in.half));
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / in.heads, g = at % in.heads, count = in.count[b];
      if (count == 0) continue;
      for (int64_t j = 0; j < in.half; ++j) {
        cos[size_t(j)] = in.cosine<T>(b, j);
        sin[size_t(j)] = in.sine<T>(b, j);
      }
      // upwards, so that nothing is written before it is read
      for (int64_t n = in.first[b]; n + count < in.length[b]; ++n) {
        turn_row<T>(in.k.row<T>(b, g, n + count), cos.data(), sin.data(), in.half, in.k.row<T>(b, g, n));
        memcpy(static_cast<void*>(in.v.row<T>(b, g, n)), in.v.row<T>(b, g, n + count), sizeof(T) * size_t(2 * in.half));
      }
    }
  });
}

}  // namespace

void rope_evict(const RopeEvict& in, void*) {
  with_type(in.type, [&](auto one) { evict<decltype(one)>(in); });
}
#endif

namespace {

void evict_op(Tensor k_mem, Tensor v_mem, const Tensor mem_len, const Tensor first, const Tensor count, const Tensor cos, const Tensor sin) {
  const Stream stream(k_mem);
  rope_evict({float_type(k_mem), k_mem.size(0), k_mem.size(1), k_mem.size(3) / 2, pointer_to<int32_t>(mem_len), pointer_to<int32_t>(first),
              pointer_to<int32_t>(count), cos.data_ptr(), sin.data_ptr(), rows(k_mem), rows(v_mem)},
             stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(beacon, library) { library.impl("rope_evict_", TORCH_BOX(&kernels::evict_op)); }
