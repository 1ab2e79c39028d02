// What the op.cpp files of recurrences share.
#pragma once
#include "recurrence.h"
#include "registration.h"

namespace kernels {

// Calls the function for one head of one sequence, of the size at hand, for all of them, by all threads.
template <class Inputs, class Function, class... Arguments>
void each_head(const Inputs& in, Function of_32, Function of_64, Function of_128, Arguments... arguments) {
  const Function function = in.size == 32 ? of_32 : in.size == 64 ? of_64 : of_128;
  torch::stable::parallel_for(0, in.sequences.count * in.sequences.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(in, i / in.sequences.heads, i % in.sequences.heads, arguments...);
  });
}

// [B, H, N] is one token of each sequence, [B, T, H, N] are T.
inline Sequences sequences_of(const Tensor& r, const std::optional<Tensor>& mask, const std::optional<Tensor>& starts) {
  Sequences sequences{};
  const bool one = r.dim() == 3;
  sequences.length = one ? 1 : r.size(1);
  sequences.heads = r.size(one ? 1 : 2);
  sequences.tokens = r.size(0) * sequences.length;
  sequences.count = starts ? starts->numel() - 1 : r.size(0);
  sequences.starts = pointer_to<int32_t>(starts);
  sequences.mask = pointer_to<bool>(mask);
  return sequences;
}

inline float* pointer_or_null(const Tensor& tensor) { return tensor.numel() ? pointer_to<float>(tensor) : nullptr; }

}  // namespace kernels
