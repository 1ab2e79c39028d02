// A thread takes eight elements, 16 random bits each.
#include <cmath>

#include "../../include/weights_cuda.h"
#include "op.h"

namespace kernels {
namespace {

template <class W, class T>
__global__ void __launch_bounds__(write_threads) write_kernel(Write in) {
  write_eight<W>(in, [&](int64_t i) { return widen(static_cast<const T*>(in.back)[i]); });
}

template <class W>
auto kernel_for(Float back) {
  return back == Float::float32 ? write_kernel<W, float> : write_kernel<W, bfloat16>;
}

}  // namespace

void lowrank_write(const Write& in, void* stream) {
  if (in.count == 0) return;
  const auto kernel = in.weight_type == Float::float32 ? kernel_for<float>(in.type) : kernel_for<bfloat16>(in.type);
  LAUNCH(kernel, write_blocks(in), dim3(write_threads), 0, stream)(in);
}

}  // namespace kernels
