#include "../../include/cpu_rows.h"
#include "../../include/registration.h"
#include "op.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
// The CPU twin of op.cu: slices of tokens by one thread each.
namespace {

template <class Run>
void with_float(Float type, Run run) {
  if (type == Float::float32)
    run(float{});
  else
    run(bfloat16{});
}

template <class Run>
void each_slice(const Shift& in, Run run) {
  torch::stable::parallel_for(0, num_slices(in.tokens()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) run(slice);
  });
}

// The row that is before a token, or null for zeros.
template <class T>
const T* before(const Shift& in, int64_t token) {
  const int64_t row = token / in.time, source = in.source_of(token);
  if (source >= 0) return static_cast<const T*>(in.h) + (row * in.time + source) * in.width;
  return source == Shift::from_prev && in.prev ? static_cast<const T*>(in.prev) + row * in.width : nullptr;
}

template <class T>
void forward_slice(const Shift& in, T* out, int64_t slice) {
  for (int64_t token = slice * slice_tokens; token < slice_end(slice, in.tokens()); ++token) {
    const T* h = static_cast<const T*>(in.h) + token * in.width;
    const T* p = before<T>(in, token);
    const auto place = [&](int64_t mix) { return out + (mix * in.tokens() + token) * in.width; };
    if (in.source_of(token) == Shift::padding) {
      for (int64_t mix = 0; mix < in.mixes; ++mix) std::memset(static_cast<void*>(place(mix)), 0, sizeof(T) * size_t(in.width));
      continue;
    }
    each_lanes<T>(0, in.width, [&](int64_t i, int64_t present) {
      const floats own = get(h + i, present, 0.0f), distance = (p ? get(p + i, present, 0.0f) : splat(0)) - own;
      for (int64_t mix = 0; mix < in.mixes; ++mix)
        put(place(mix) + i, own + distance * get(in.mus + mix * in.width + i, present, 0.0f), present);
    });
  }
}

// Columns whose sums over a slice stay in the first-level cache.
constexpr int64_t block_columns = 256;

// The gradient of one token in some columns, and what it adds to the sums.
template <class T>
void backward_token(const Shift& in, const T* dout, T* dh, T* dprev, float (*sums)[block_columns], int64_t token, int64_t first,
                    int64_t count) {
  const int64_t row = token / in.time, source = in.source_of(token), successor = in.successor_of(token);
  const auto put_result = [&](int64_t i, int64_t present, floats value) { put(dh + token * in.width + first + i, value, present); };
  if (source == Shift::padding) return each_lanes<T>(0, count, [&](int64_t i, int64_t present) { put_result(i, present, splat(0)); });
  const T* h = static_cast<const T*>(in.h) + token * in.width + first;
  const T* p = before<T>(in, token);
  each_lanes<T>(0, count, [&](int64_t i, int64_t present) {
    const auto gradient_of = [&](int64_t mix, int64_t of) {
      return get(dout + (mix * in.tokens() + of) * in.width + first + i, present, 0.0f);
    };
    const floats distance = (p ? get(p + first + i, present, 0.0f) : splat(0)) - get(h + i, present, 0.0f);
    floats result = splat(0), to_prev = splat(0);
    for (int64_t mix = 0; mix < in.mixes; ++mix) {
      const floats mu = get(in.mus + mix * in.width + first + i, present, 0.0f), gradient = gradient_of(mix, token);
      result += gradient - gradient * mu;
      to_prev += gradient * mu;
      store(sums[mix] + i, load(sums[mix] + i) + gradient * distance);
      if (successor >= 0) result += gradient_of(mix, row * in.time + successor) * mu;
    }
    if (source == Shift::from_prev && dprev) put(dprev + row * in.width + first + i, to_prev, present);
    put_result(i, present, result);
  });
}

template <class T>
void backward_slice(const Shift& in, const T* dout, T* dh, T* dprev, float* partial, int64_t slice) {
  alignas(64) float sums[max_mixes][block_columns];
  for (int64_t first = 0; first < in.width; first += block_columns) {
    const int64_t count = std::min(block_columns, in.width - first);
    memset(sums, 0, sizeof sums);
    for (int64_t token = slice * slice_tokens; token < slice_end(slice, in.tokens()); ++token)
      backward_token(in, dout, dh, dprev, sums, token, first, count);
    for (int64_t mix = 0; mix < in.mixes; ++mix)
      memcpy(partial + (slice * in.mixes + mix) * in.width + first, sums[mix], sizeof(float) * size_t(count));
  }
}

}  // namespace

void tmix_shift_forward(const Shift& in, void* out, void*) {
  with_float(in.type, [&](auto one) {
    using T = decltype(one);
    each_slice(in, [&](int64_t slice) { forward_slice(in, static_cast<T*>(out), slice); });
  });
}

void tmix_shift_backward(const Shift& in, const void* dout, void* dh, void* dprev, float* partial, void*) {
  with_float(in.type, [&](auto one) {
    using T = decltype(one);
    each_slice(in, [&](int64_t slice) {
      backward_slice(in, static_cast<const T*>(dout), static_cast<T*>(dh), static_cast<T*>(dprev), partial, slice);
    });
  });
}
#endif

namespace {

using Optional = std::optional<Tensor>;

Shift inputs(const Tensor& h, const Optional& prev, const Optional& source, const Optional& successor, const Tensor& mus) {
  return {float_type(h), h.size(0),           h.size(1),           h.size(2), mus.size(0), h.data_ptr(), pointer_to<void>(prev),
          pointer_to<int32_t>(source), pointer_to<int32_t>(successor), pointer_to<float>(mus)};
}

void forward_op(const Tensor h, const Optional prev, const Optional source, const Tensor mus, Tensor out) {
  const Stream stream(h);
  tmix_shift_forward(inputs(h, prev, source, {}, mus), out.data_ptr(), stream.handle);
}

void backward_op(const Tensor h, const Optional prev, const Optional source, const Optional successor, const Tensor mus, const Tensor dout,
                 Tensor dh, Tensor dprev, Tensor partial) {
  const Stream stream(h);
  tmix_shift_backward(inputs(h, prev, source, successor, mus), dout.data_ptr(), dh.data_ptr(),
                      dprev.numel() ? dprev.data_ptr() : nullptr, pointer_to<float>(partial), stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(rwkv_distill, library) {
  library.impl("tmix_shift_forward_", TORCH_BOX(&kernels::forward_op));
  library.impl("tmix_shift_backward_", TORCH_BOX(&kernels::backward_op));
}
