// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/recurrence.h"

namespace kernels {

// The inputs [tokens][heads][size], contiguous; float32 or bfloat16; size 32, 64 or 128. States and sums are float32.
struct Wkv7 {
  Sequences sequences;
  Float type;
  int64_t size;
  const void *r, *w, *k, *v, *a, *b;
};

// y like the inputs. States are [sequences][heads][size][size], rows are values: `initial` may be null (zero), `final` too (unwanted).
// `kept` [chunks][heads][size][size] and `removed` [tokens][heads][size] (S a of every token) serve backward; both or none are null.
void wkv7_forward(const Wkv7& in, const float* initial, void* y, float* final, float* kept, float* removed, void* stream);

struct Wkv7Gradients {
  void *r, *w, *k, *v, *a, *b;
  float* initial;  // may be null
};

// From dy and the gradient of the final state (null: zero). `history` is room for
// [sequences][heads][chunk_tokens + 1][size][size] floats, which only GPUs use.
void wkv7_backward(const Wkv7& in, const float* kept, const float* removed, const void* dy, const float* dfinal, float* history,
                   const Wkv7Gradients& out, void* stream);

// The same by chunks of 16 tokens on tensor cores (chunked.cu): bfloat16 inputs, all pointers at multiples of 16 bytes. A state is kept
// before every `segment_tokens` tokens; `history` is room for [sequences][heads][segment_tokens / 16][size][size] bfloat16 numbers.
void wkv7_chunked_forward(const Wkv7& in, const float* initial, void* y, float* final, float* kept, void* stream);
void wkv7_chunked_backward(const Wkv7& in, const float* kept, const void* dy, const float* dfinal, void* history,
                           const Wkv7Gradients& out, void* stream);

// One token of every sequence: the state changes in place.
void wkv7_step(const Wkv7& in, float* state, void* y, void* stream);

}  // namespace kernels
