#include "../../include/cpu_rows.h"
#include "../../include/registration.h"
#include "op.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
// The CPU twin of op.cu: one head of a slice of tokens after the other.
namespace {

// One vector of a head, widened, with zeros behind its end.
struct Vector {
  alignas(64) float values[max_head_size];
};

// What lies in one head of one token.
template <class T>
struct HeadOf {
  const Output& in;
  int64_t token, head, parameters;

  template <class Visit>
  void each(Visit visit) const {
    each_lanes<float>(0, in.size, visit);
  }
  int64_t place() const { return (token * in.heads + head) * in.size; }
  floats get_value(const void* from, int64_t i, int64_t present) const {
    return get(static_cast<const T*>(from) + place() + i, present, 0.0f);
  }
  void put_value(void* to, int64_t i, int64_t present, floats value) const { put(static_cast<T*>(to) + place() + i, value, present); }
  floats get_parameter(const float* from, int64_t i, int64_t present) const { return get(from + parameters + i, present, 0.0f); }

  template <class Value>
  float sum_of(Value value) const {
    floats total = splat(0);
    each([&](int64_t i, int64_t present) { total += value(i, present); });
    return sums<1>(&total)[0];
  }

  // y less its mean, over its standard deviation; returns one over that.
  float normalise(Vector& to) const {
    const float mean = sum_of([&](int64_t i, int64_t present) { return get_value(in.y, i, present); }) / float(in.size);
    // lanes behind the end would count with the square of the mean
    each([&](int64_t i, int64_t present) {
      floats distance = get_value(in.y, i, present) - mean;
      for (int64_t lane = present; lane < lanes; ++lane) distance[lane] = 0;
      store(to.values + i, distance);
    });
    const float variance = sum_of([&](int64_t i, int64_t) { return load(to.values + i) * load(to.values + i); }) / float(in.size);
    const float scale = 1 / std::sqrt(variance + in.eps);
    each([&](int64_t i, int64_t) { store(to.values + i, load(to.values + i) * scale); });
    return scale;
  }

  float bonus() const {
    return sum_of([&](int64_t i, int64_t present) {
      return get_value(in.r, i, present) * get_value(in.k, i, present) * get_parameter(in.bonus, i, present);
    });
  }

  // Before the gate, given normalised y (used if there is a weight) and the sum of the bonus.
  floats stage(const Vector& normalised, float bonus_sum, int64_t i, int64_t present) const {
    floats result = in.weight ? load(normalised.values + i) * get_parameter(in.weight, i, present) + get_parameter(in.bias, i, present)
                              : get_value(in.y, i, present);
    if (in.bonus) result += get_value(in.v, i, present) * bonus_sum;
    return result;
  }
};

template <class T>
void forward_head(const HeadOf<T>& at, void* out) {
  Vector normalised;
  if (at.in.weight) at.normalise(normalised);
  const float bonus = at.in.bonus ? at.bonus() : 0;
  at.each([&](int64_t i, int64_t present) {
    floats result = at.stage(normalised, bonus, i, present);
    if (at.in.gate) result *= at.get_value(at.in.gate, i, present);
    at.put_value(out, i, present, result);
  });
}

struct Sums {
  Vector bonus, weight, bias;
};

template <class T>
void backward_head(const HeadOf<T>& at, const void* dout, const OutputGradients& out, Sums& sums) {
  const Output& in = at.in;
  Vector normalised, dstage;
  const float scale = in.weight ? at.normalise(normalised) : 0;
  const float bonus = in.bonus ? at.bonus() : 0;
  at.each([&](int64_t i, int64_t present) {
    floats gradient = at.get_value(dout, i, present);
    if (in.gate) {
      at.put_value(out.gate, i, present, gradient * at.stage(normalised, bonus, i, present));
      gradient *= at.get_value(in.gate, i, present);
    }
    store(dstage.values + i, gradient);
  });
  if (in.bonus) {
    const float dbonus =
        at.sum_of([&](int64_t i, int64_t present) { return load(dstage.values + i) * at.get_value(in.v, i, present); });
    at.each([&](int64_t i, int64_t present) {
      const floats r = at.get_value(in.r, i, present), k = at.get_value(in.k, i, present), by = at.get_parameter(in.bonus, i, present);
      at.put_value(out.v, i, present, load(dstage.values + i) * bonus);
      at.put_value(out.r, i, present, k * by * dbonus);
      at.put_value(out.k, i, present, r * by * dbonus);
      store(sums.bonus.values + i, load(sums.bonus.values + i) + r * k * dbonus);
    });
  }
  if (!in.weight) {
    at.each([&](int64_t i, int64_t present) { at.put_value(out.y, i, present, load(dstage.values + i)); });
    return;
  }
  const auto dnormalised = [&](int64_t i, int64_t present) { return load(dstage.values + i) * at.get_parameter(in.weight, i, present); };
  const float mean = at.sum_of(dnormalised) / float(in.size);
  const float along =
      at.sum_of([&](int64_t i, int64_t present) { return dnormalised(i, present) * load(normalised.values + i); }) / float(in.size);
  at.each([&](int64_t i, int64_t present) {
    const floats of_stage = load(dstage.values + i), x = load(normalised.values + i);
    store(sums.weight.values + i, load(sums.weight.values + i) + of_stage * x);
    store(sums.bias.values + i, load(sums.bias.values + i) + of_stage);
    at.put_value(out.y, i, present, (dnormalised(i, present) - mean - x * along) * scale);
  });
}

// Calls run(HeadOf<T>, slice) for the tokens of each head of each slice, in order.
template <class Run>
void each_head_of_slice(const Output& in, Run run) {
  torch::stable::parallel_for(0, num_slices(in.tokens) * in.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i / in.heads, i % in.heads);
  });
}

template <class Run>
void with_float(Float type, Run run) {
  if (type == Float::float32)
    run(float{});
  else
    run(bfloat16{});
}

}  // namespace

void tmix_out_forward(const Output& in, void* out, void*) {
  with_float(in.type, [&](auto one) {
    each_head_of_slice(in, [&](int64_t slice, int64_t head) {
      for (int64_t token = slice * slice_tokens; token < slice_end(slice, in.tokens); ++token)
        forward_head(HeadOf<decltype(one)>{in, token, head, head * in.size}, out);
    });
  });
}

void tmix_out_backward(const Output& in, const void* dout, const OutputGradients& out, void*) {
  with_float(in.type, [&](auto one) {
    each_head_of_slice(in, [&](int64_t slice, int64_t head) {
      Sums sums{};
      for (int64_t token = slice * slice_tokens; token < slice_end(slice, in.tokens); ++token)
        backward_head(HeadOf<decltype(one)>{in, token, head, head * in.size}, dout, out, sums);
      const Vector* each[] = {&sums.bonus, &sums.weight, &sums.bias};
      for (int64_t which = 0; which < 3; ++which)
        memcpy(out.partial + ((slice * 3 + which) * in.heads + head) * in.size, each[which]->values, sizeof(float) * size_t(in.size));
    });
  });
}
#endif

namespace {

using Optional = std::optional<Tensor>;

Output inputs(const Tensor& y, const Optional& r, const Optional& k, const Optional& v, const Optional& bonus, const Optional& weight,
              const Optional& bias, const Optional& gate, double eps) {
  return {float_type(y),         y.size(0),
          y.size(1),             y.size(2),
          y.data_ptr(),          pointer_to<void>(r),
          pointer_to<void>(k),   pointer_to<void>(v),
          pointer_to<void>(gate), pointer_to<float>(bonus),
          pointer_to<float>(weight), pointer_to<float>(bias),
          float(eps)};
}

void forward_op(const Tensor y, const Optional r, const Optional k, const Optional v, const Optional bonus, const Optional weight,
                const Optional bias, const Optional gate, double eps, Tensor out) {
  const Stream stream(y);
  tmix_out_forward(inputs(y, r, k, v, bonus, weight, bias, gate, eps), out.data_ptr(), stream.handle);
}

void backward_op(const Tensor y, const Optional r, const Optional k, const Optional v, const Optional bonus, const Optional weight,
                 const Optional bias, const Optional gate, double eps, const Tensor dout, Tensor dy, Tensor dr, Tensor dk, Tensor dv,
                 Tensor dgate, Tensor partial) {
  const Stream stream(y);
  const OutputGradients out = {dy.data_ptr(), dr.data_ptr(), dk.data_ptr(), dv.data_ptr(), dgate.data_ptr(), pointer_to<float>(partial)};
  tmix_out_backward(inputs(y, r, k, v, bonus, weight, bias, gate, eps), dout.data_ptr(), out, stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(rwkv_distill, library) {
  library.impl("tmix_out_forward_", TORCH_BOX(&kernels::forward_op));
  library.impl("tmix_out_backward_", TORCH_BOX(&kernels::backward_op));
}
