// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/floats.h"

namespace kernels {

// One chunk of logits, `rows` x `vocabulary`, contiguous. losses[row] = logsumexp(logits) - logits[label]. With
// `gradient` the logits are replaced by weights[row] * (softmax(logits) - onehot(label)). Rows whose label is
// `ignore_index` get loss 0 and gradient 0. losses and weights hold Wide<type>; weights may be null (all ones).
// A label outside the vocabulary gives a NaN loss.
void softmax_gradient(void* logits, Float type, const int64_t* labels, const void* weights, void* losses, int64_t rows, int64_t vocabulary,
                      int64_t ignore_index, bool gradient, void* stream);

// A float32 sum kept in two 16-bit halves: (high, low) += part, element by element.
void add_split(uint16_t* high, uint16_t* low, const void* part_bfloat16, int64_t count, void* stream);

// Leaves in `high` the sum rounded to bfloat16.
void round_split(uint16_t* high, const uint16_t* low, int64_t count, void* stream);

}  // namespace kernels
