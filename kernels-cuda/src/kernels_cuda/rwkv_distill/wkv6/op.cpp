#include "../../include/recurrence_registration.h"
#include "op.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
#define KERNELS_TWIN "../rwkv_distill/wkv6/twin.h"
#include "../../include/cpu_levels.h"

namespace kernels {

void wkv6_forward(const Wkv6& in, const float* initial, void* y, float* final, float* kept, void*) {
  each_head(in, LEVEL_CALL(forward_head<32>), LEVEL_CALL(forward_head<64>), LEVEL_CALL(forward_head<128>), initial, y, final, kept);
}

void wkv6_backward(const Wkv6& in, const float* kept, const void* dy, const float* dfinal, float*, const Wkv6Gradients& out, void*) {
  each_head(in, LEVEL_CALL(backward_head<32>), LEVEL_CALL(backward_head<64>), LEVEL_CALL(backward_head<128>), kept, dy, dfinal, out);
}

void wkv6_step(const Wkv6& in, float* state, void* y, void*) {
  each_head(in, LEVEL_CALL(step_head<32>), LEVEL_CALL(step_head<64>), LEVEL_CALL(step_head<128>), state, y);
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

using Optional = std::optional<Tensor>;

Wkv6 inputs(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u, const Optional& mask,
            const Optional& starts) {
  return {sequences_of(r, mask, starts), float_type(r), r.size(r.dim() - 1), r.data_ptr(), k.data_ptr(), v.data_ptr(), w.data_ptr(), u.data_ptr()};
}

void forward_op(const Tensor r, const Tensor k, const Tensor v, const Tensor w, const Tensor u, const Optional initial, const Optional mask,
                const Optional starts, Tensor y, Tensor final, Tensor kept) {
  const Stream stream(r);
  wkv6_forward(inputs(r, k, v, w, u, mask, starts), pointer_to<float>(initial), y.data_ptr(), pointer_or_null(final), pointer_or_null(kept),
               stream.handle);
}

void backward_op(const Tensor r, const Tensor k, const Tensor v, const Tensor w, const Tensor u, const Optional mask, const Optional starts,
                 const Tensor kept, const Tensor dy, const Optional dfinal, Tensor history, Tensor dr, Tensor dk, Tensor dv, Tensor dw,
                 Tensor du, Tensor dinitial) {
  const Stream stream(r);
  const Wkv6Gradients out = {dr.data_ptr(), dk.data_ptr(), dv.data_ptr(), dw.data_ptr(), pointer_to<float>(du), pointer_or_null(dinitial)};
  wkv6_backward(inputs(r, k, v, w, u, mask, starts), pointer_to<float>(kept), dy.data_ptr(), pointer_to<float>(dfinal),
                pointer_or_null(history), out, stream.handle);
}

void step_op(const Tensor r, const Tensor k, const Tensor v, const Tensor w, const Tensor u, Tensor state, Tensor y) {
  const Stream stream(r);
  wkv6_step(inputs(r, k, v, w, u, {}, {}), pointer_to<float>(state), y.data_ptr(), stream.handle);
}

#if defined(KERNELS_CUDA_BUILD_CUDA) || defined(KERNELS_CUDA_BUILD_EMULATED)
#define KERNELS_CHUNKED
void chunked_forward_op(const Tensor r, const Tensor k, const Tensor v, const Tensor w, const Tensor u, const Optional initial,
                        const Optional mask, const Optional starts, Tensor y, Tensor final, Tensor kept) {
  const Stream stream(r);
  wkv6_chunked_forward(inputs(r, k, v, w, u, mask, starts), pointer_to<float>(initial), y.data_ptr(), pointer_or_null(final),
                       pointer_or_null(kept), stream.handle);
}

void chunked_backward_op(const Tensor r, const Tensor k, const Tensor v, const Tensor w, const Tensor u, const Optional mask,
                         const Optional starts, const Tensor kept, const Tensor dy, const Optional dfinal, Tensor history, Tensor dr,
                         Tensor dk, Tensor dv, Tensor dw, Tensor du, Tensor dinitial) {
  const Stream stream(r);
  const Wkv6Gradients out = {dr.data_ptr(), dk.data_ptr(), dv.data_ptr(), dw.data_ptr(), pointer_to<float>(du), pointer_or_null(dinitial)};
  wkv6_chunked_backward(inputs(r, k, v, w, u, mask, starts), pointer_to<float>(kept), dy.data_ptr(), pointer_to<float>(dfinal),
                        history.data_ptr(), out, stream.handle);
}
#endif

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(rwkv_distill, library) {
  library.impl("wkv6_forward_", TORCH_BOX(&kernels::forward_op));
  library.impl("wkv6_backward_", TORCH_BOX(&kernels::backward_op));
  library.impl("wkv6_step_", TORCH_BOX(&kernels::step_op));
#ifdef KERNELS_CHUNKED
  library.impl("wkv6_chunked_forward_", TORCH_BOX(&kernels::chunked_forward_op));
  library.impl("wkv6_chunked_backward_", TORCH_BOX(&kernels::chunked_backward_op));
#endif
}
