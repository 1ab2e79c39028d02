// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/recurrence.h"

namespace kernels {

// The inputs [tokens][heads][size] and u [heads][size], contiguous; float32 or bfloat16; size 32, 64 or 128. States are float32.
struct Wkv6 {
  Sequences sequences;
  Float type;
  int64_t size;
  const void *r, *k, *v, *w, *u;
};

// y like the inputs. States are [sequences][heads][size][size], rows are values: `initial` may be null (zero), `final` too (unwanted).
// `kept` [chunks][heads][size][size] serves backward and may be null.
void wkv6_forward(const Wkv6& in, const float* initial, void* y, float* final, float* kept, void* stream);

struct Wkv6Gradients {
  void *r, *k, *v, *w;
  float* u;        // [sequences][heads][size]
  float* initial;  // may be null
};

// From dy and the gradient of the final state (null: zero). `history` is room for
// [sequences][heads][chunk_tokens + 1][size][size] floats, which only GPUs use.
void wkv6_backward(const Wkv6& in, const float* kept, const void* dy, const float* dfinal, float* history, const Wkv6Gradients& out,
                   void* stream);

// The same by chunks of 16 tokens on tensor cores (chunked.cu): bfloat16 inputs, all pointers at multiples of 16 bytes. A state is kept
// before every `segment_tokens` tokens; `history` is room for [sequences][heads][segment_tokens / 16][size][size] bfloat16 numbers.
void wkv6_chunked_forward(const Wkv6& in, const float* initial, void* y, float* final, float* kept, void* stream);
void wkv6_chunked_backward(const Wkv6& in, const float* kept, const void* dy, const float* dfinal, void* history,
                           const Wkv6Gradients& out, void* stream);

// One token of every sequence: the state changes in place.
void wkv6_step(const Wkv6& in, float* state, void* y, void* stream);

}  // namespace kernels
