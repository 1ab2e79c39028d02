// Launcher of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/rope_rows.h"

namespace kernels {

// One query per head over the first `length` of the places of two segments. Queries are [batch][groups][each][size]; the `each` heads of a
// group share its keys. Keys are read in splits, which never cross segments; what a split finds waits in `parts` (out, [..][splits][size])
// and `lses` until all are joined.
struct DecodeAttention {
  static constexpr int64_t split = 256;  // keys; binding.py knows it, too

  Float type;
  int64_t batch, groups, each, size;
  int64_t places[2];
  const int32_t* length[2];
  double scale;
  Rows q;  // [batch][groups][each]
  Rows k[2], v[2];
  void *out, *lse, *parts, *lses;

  KERNELS_FN int64_t splits_of(int segment) const { return (places[segment] + split - 1) / split; }
  KERNELS_FN int64_t splits() const { return splits_of(0) + splits_of(1); }
};

// Keys of one split: [first, last) of a segment, none where its row is shorter.
struct Split {
  int segment;
  int64_t first, last;

  KERNELS_FN Split(const DecodeAttention& in, int64_t b, int64_t number) {
    segment = number < in.splits_of(0) ? 0 : 1;
    first = (number - (segment ? in.splits_of(0) : 0)) * DecodeAttention::split;
    const int64_t end = first + DecodeAttention::split, length = in.length[segment][b];
    last = end < length ? end : length;
  }
};

void decode_attention(const DecodeAttention& in, void* stream);

}  // namespace kernels
