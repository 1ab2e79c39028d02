// Launchers of op.cu: raw pointers, sizes and a stream, so that nvcc needs no torch header.
// T tokens, K experts of a token, R = T K rows, N experts, E neurons of an expert, D hidden size.
#pragma once
#include "float16.h"

namespace kernels {

// Rows of one block of the sort.
constexpr int64_t sort_rows = 256;
inline int64_t num_sort_blocks(int64_t rows) { return (rows + sort_rows - 1) / sort_rows; }

// Stable counting sort of the rows by expert. order_R: old numbers of the rows in the new order; inverse_R: the new number of each;
// ends_N: where each expert's rows end. counts has num_sort_blocks(rows) * num_experts numbers to work with. Experts outside count as
// the nearest one.
void sort_tokens(const int32_t* experts_R, int64_t rows, int64_t num_experts, int32_t* counts, int32_t* order_R, int32_t* inverse_R,
                 int32_t* ends_N, void* stream);

// h = silu(gate) * up * score for `rows` rows of 2 E numbers, gate before up.
void swiglu_score(const void* gate_up, Value type, const float* score, void* h, int64_t rows, int64_t size, void* stream);

// The gradients of gate_up and score for that of h, and h again.
void swiglu_score_backward(const void* gate_up, Value type, const float* score, const void* dh, void* h, void* dgate_up, float* dscore,
                           int64_t rows, int64_t size, void* stream);

// Rows `first` to `first + count` of the sorted order, summed over each token's K slots in order: out[t] = sum, or out[t] += sum with
// `add`. Slots elsewhere are left out. `wide_out`: out holds float32 whatever the type of the rows.
void combine(void* out, bool wide_out, const void* rows, Value type, const int32_t* inverse_TK, int64_t tokens, int64_t slots,
             int64_t width, int64_t first, int64_t count, bool add, void* stream);

}  // namespace kernels
