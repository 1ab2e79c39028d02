// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
#pragma once
#include "../../include/rope_rows.h"

namespace kernels {

// Entry n of row b is place src[b][n], rotated to position pos[b][n] of the tables cos and sin [positions][half] (double for double).
struct RopeGather {
  Float type;
  int64_t batch, heads, length, entries, half, positions;
  const int64_t* pos;
  const void* cos;
  const void* sin;
};

void rope_gather_forward(const RopeGather& in, const int64_t* src, const Rows& k, const Rows& v, const Rows& k_out, const Rows& v_out,
                         void* stream);

// From the gradients of k_out and v_out. The entries of place t are order[b][begin[b][t]] to order[b][begin[b][t + 1] - 1], rising;
// begin is [batch][length + 1].
void rope_gather_backward(const RopeGather& in, const int64_t* order, const int64_t* begin, const Rows& dk_out, const Rows& dv_out,
                          const Rows& dk, const Rows& dv, void* stream);

}  // namespace kernels
