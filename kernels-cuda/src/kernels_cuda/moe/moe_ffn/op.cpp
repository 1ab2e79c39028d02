// T tokens, K slots, R rows, N experts, E neurons of an expert
#include <vector>

#include "../../include/cpu_rows.h"
#include "../../include/registration.h"
#include "op.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
// The CPU twin of op.cu.
// A lane at a time: the products in this type take far longer.
inline floats load(const float16* from) { return load_tail(from, lanes, 0.0f); }
inline void store(float16* to, floats value) { store_tail(to, value, lanes); }

namespace {

constexpr int64_t row_grain = 16;

inline floats sigmoid(floats x) {
  const floats negative = floats{} - x;
  // beyond it e^x is infinite; a NaN stays one
  return 1.0f / (1.0f + exponential(negative > 88.0f ? splat(88.0f) : negative));
}

int32_t nearest(int32_t expert, int64_t num_experts) { return std::min(std::max(expert, 0), int32_t(num_experts) - 1); }

}  // namespace

void sort_tokens(const int32_t* experts_R, int64_t rows, int64_t num_experts, int32_t*, int32_t* order_R, int32_t* inverse_R,
                 int32_t* ends_N, void*) {
  std::vector<int32_t> next(size_t(num_experts) + 1);
  for (int64_t row = 0; row < rows; ++row) ++next[size_t(nearest(experts_R[row], num_experts)) + 1];
  for (int64_t expert = 0; expert < num_experts; ++expert) ends_N[expert] = next[size_t(expert) + 1] += next[size_t(expert)];
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t place = next[size_t(nearest(experts_R[row], num_experts))]++;
    order_R[place] = int32_t(row);
    inverse_R[row] = place;
  }
}

void swiglu_score(const void* gate_up, Value type, const float* score, void* h, int64_t rows, int64_t size, void*) {
  with_value(type, [&](auto one) {
    using T = decltype(one);
    torch::stable::parallel_for(0, rows, row_grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = static_cast<const T*>(gate_up) + row * 2 * size;
        T* out = static_cast<T*>(h) + row * size;
        each_lanes<T>(0, size, [&](int64_t i, int64_t present) {
          const floats x = get(gate + i, present, 0.0f);
          put(out + i, x * sigmoid(x) * get(gate + size + i, present, 0.0f) * score[row], present);
        });
      }
    });
  });
}

void swiglu_score_backward(const void* gate_up, Value type, const float* score, const void* dh, void* h, void* dgate_up, float* dscore,
                           int64_t rows, int64_t size, void*) {
  with_value(type, [&](auto one) {
    using T = decltype(one);
    torch::stable::parallel_for(0, rows, row_grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* gate = static_cast<const T*>(gate_up) + row * 2 * size;
        const T* gradient = static_cast<const T*>(dh) + row * size;
        T* out = static_cast<T*>(h) + row * size;
        T* dgate = static_cast<T*>(dgate_up) + row * 2 * size;
        floats of_score = splat(0.0f);
        each_lanes<T>(0, size, [&](int64_t i, int64_t present) {
          const floats x = get(gate + i, present, 0.0f), up = get(gate + size + i, present, 0.0f);
          const floats of_h = get(gradient + i, present, 0.0f), open = sigmoid(x), scaled = of_h * score[row];
          of_score += of_h * (x * open * up);
          put(out + i, x * open * up * score[row], present);
          put(dgate + i, scaled * up * (open * (1.0f + x * (1.0f - open))), present);
          put(dgate + size + i, scaled * (x * open), present);
        });
        dscore[row] = float(sum(of_score));
      }
    });
  });
}

namespace {

template <class Out, class T>
void combine_tokens(Out* out, const T* rows, const int32_t* inverse_TK, int64_t tokens, int64_t slots, int64_t width, int64_t first,
                    int64_t count, bool add) {
  torch::stable::parallel_for(0, tokens, row_grain, [&](int64_t begin, int64_t end) {
    std::vector<const T*> found(size_t(slots) + 1);
    for (int64_t token = begin; token < end; ++token) {
      size_t num_found = 0;
      for (int64_t slot = 0; slot < slots; ++slot) {
        const int64_t row = inverse_TK[token * slots + slot] - first;
        if (row >= 0 && row < count) found[num_found++] = rows + row * width;
      }
      if (num_found == 0 && add) continue;
      Out* to = out + token * width;
      each_lanes<T>(0, width, [&](int64_t i, int64_t present) {
        floats total = add ? get(to + i, present, 0.0f) : splat(0.0f);
        for (size_t n = 0; n < num_found; ++n) total += get(found[n] + i, present, 0.0f);
        put(to + i, total, present);
      });
    }
  });
}

}  // namespace

void combine(void* out, bool wide_out, const void* rows, Value type, const int32_t* inverse_TK, int64_t tokens, int64_t slots,
             int64_t width, int64_t first, int64_t count, bool add, void*) {
  with_value(type, [&](auto one) {
    using T = decltype(one);
    const auto run = [&](auto* to) {
      combine_tokens(to, static_cast<const T*>(rows), inverse_TK, tokens, slots, width, first, count, add);
    };
    if (wide_out)
      run(static_cast<float*>(out));
    else
      run(static_cast<T*>(out));
  });
}
#endif

namespace {

Value value_type(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Half) return Value::float16;
  return float_type(tensor) == Float::float32 ? Value::float32 : Value::bfloat16;
}

void sort_tokens_op(const Tensor experts_R, Tensor counts, Tensor order_R, Tensor inverse_R, Tensor ends_N) {
  const Stream stream(experts_R);
  sort_tokens(pointer_to<int32_t>(experts_R), experts_R.numel(), ends_N.numel(), pointer_to<int32_t>(counts), pointer_to<int32_t>(order_R),
              pointer_to<int32_t>(inverse_R), pointer_to<int32_t>(ends_N), stream.handle);
}

void swiglu_score_op(const Tensor gate_up, const Tensor score, Tensor h) {
  const Stream stream(gate_up);
  swiglu_score(gate_up.data_ptr(), value_type(gate_up), pointer_to<float>(score), h.data_ptr(), h.size(0), h.size(1), stream.handle);
}

void swiglu_score_backward_op(const Tensor gate_up, const Tensor score, const Tensor dh, Tensor h, Tensor dgate_up, Tensor dscore) {
  const Stream stream(gate_up);
  swiglu_score_backward(gate_up.data_ptr(), value_type(gate_up), pointer_to<float>(score), dh.data_ptr(), h.data_ptr(),
                        dgate_up.data_ptr(), pointer_to<float>(dscore), h.size(0), h.size(1), stream.handle);
}

void combine_op(Tensor out, const Tensor rows, const Tensor inverse_TK, int64_t first, bool add) {
  const Stream stream(out);
  combine(out.data_ptr(), value_type(out) == Value::float32, rows.data_ptr(), value_type(rows), pointer_to<int32_t>(inverse_TK),
          out.size(0), inverse_TK.size(1), out.size(1), first, rows.size(0), add, stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(moe, library) {
  library.impl("sort_tokens_", TORCH_BOX(&kernels::sort_tokens_op));
  library.impl("swiglu_score_", TORCH_BOX(&kernels::swiglu_score_op));
  library.impl("swiglu_score_backward_", TORCH_BOX(&kernels::swiglu_score_backward_op));
  library.impl("combine_", TORCH_BOX(&kernels::combine_op));
}
