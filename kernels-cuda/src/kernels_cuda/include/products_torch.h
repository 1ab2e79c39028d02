// Products of torch's tensors on the CPU.
#pragma once
#include "products.h"
#include "registration.h"

#ifdef KERNELS_HAVE_PRODUCT
namespace kernels {

inline constexpr auto over_pieces = [](int64_t count, const auto& run) { torch::stable::parallel_for(0, count, 1, run); };

// A matrix whose one stride is 1, as a factor whose element (x, p) is entry (x, p), or entry (p, x) if `swapped`.
inline Factor factor(const Tensor& matrix, bool swapped) {
  const bool by_rows = matrix.stride(1) == 1;
  const int64_t stride = matrix.stride(by_rows ? 0 : 1), rows = matrix.size(0), columns = matrix.size(1);
  return {matrix.data_ptr(), float_type(matrix), stride, by_rows != swapped, swapped ? columns : rows, swapped ? rows : columns};
}

}  // namespace kernels
#endif
