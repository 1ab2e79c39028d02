// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/token_slices.h"

namespace kernels {

constexpr int max_head_size = 256;

// y, r, k, v, gate [tokens][heads][size] in float32 or bfloat16; parameters [heads][size] in float32. What is null is left out:
// weight and bias with the normalisation, r, k, v and bonus with the bonus, gate with the gate.
struct Output {
  Float type;
  int64_t tokens, heads, size;
  const void *y, *r, *k, *v, *gate;
  const float *bonus, *weight, *bias;
  float eps;
};

// out = (normalised(y) weight + bias + (sum of r k bonus) v) gate
void tmix_out_forward(const Output& in, void* out, void* stream);

// Null where not in the inputs; partial [slices][3][heads][size] are sums of the gradients of bonus, weight and bias.
struct OutputGradients {
  void *y, *r, *k, *v, *gate;
  float* partial;
};

void tmix_out_backward(const Output& in, const void* dout, const OutputGradients& out, void* stream);

}  // namespace kernels
