// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/token_slices.h"

namespace kernels {

constexpr int max_mixes = 8;

// h [batch][time][width] and prev [batch][width] in float32 or bfloat16; mus [mixes][width].
struct Shift {
  Float type;
  int64_t batch, time, width, mixes;
  const void* h;
  const void* prev;          // of each row; null: zero
  const int32_t* source;     // [batch][time], or null: the token before. from_prev, from_nothing or padding where there is none
  const int32_t* successor;  // [batch][time], the token whose source this is, or -1; null where source is
  const float* mus;

  static constexpr int32_t from_prev = -1, from_nothing = -2, padding = -3;

  KERNELS_FN int64_t tokens() const { return batch * time; }
  // Of a token numbered over all rows; what it gives is a place in its row.
  KERNELS_FN int64_t source_of(int64_t token) const { return source ? source[token] : token % time - 1; }
  KERNELS_FN int64_t successor_of(int64_t token) const { return successor ? successor[token] : token % time + 1 < time ? token % time + 1 : -1; }
};

// out [mixes][batch][time][width]: h + (p - h) mu, where p is the token before; 0 for padding.
void tmix_shift_forward(const Shift& in, void* out, void* stream);

// From the gradient of out, like it. dprev is like prev, and zero before; partial [slices][mixes][width] are sums of dmus.
void tmix_shift_backward(const Shift& in, const void* dout, void* dh, void* dprev, float* partial, void* stream);

}  // namespace kernels
