// What recurrences by chunks of 16 tokens on tensor cores share: one block for each head of each sequence, one warp for every 16
// values (rows of the state), bfloat16 tensors at multiples of 16 bytes. N head size.
#pragma once
#include "cuda_mma.h"
#include "cuda_recurrence.h"

namespace kernels {

constexpr int chunk = 16, chunks_of_segment = segment_tokens / chunk;
constexpr int square = chunk + 8;  // stride of matrices of 16 columns

template <int N>
constexpr int num_warps = N / 16;
template <int N>
constexpr int num_threads = 2 * N;
template <int N>
constexpr int stride = N + 8;

__device__ __forceinline__ int lane_of() { return int(threadIdx.x % 32); }
__device__ __forceinline__ int warp_of() { return int(threadIdx.x / 32); }

// Eight neighbours of one token: every thread of the block has its share of a chunk's vectors.
struct Eight {
  Pack<bfloat16> pack;
  __device__ __forceinline__ float operator[](int i) const { return widen(pack.values[i]); }
};
template <int N>
struct Share {
  int token, column;  // in the chunk
  __device__ __forceinline__ Share() : token(threadIdx.x / (N / 8)), column(threadIdx.x % (N / 8) * 8) {}
  __device__ __forceinline__ Eight get(const void* from, const Head<N>& at, int64_t first, bool counts) const {
    Eight eight;
#pragma unroll
    for (int i = 0; i < 8; ++i) eight.pack.values[i] = narrow<bfloat16>(0);
    if (counts)
      eight.pack = *reinterpret_cast<const Pack<bfloat16>*>(static_cast<const bfloat16*>(from) + at.vector(first + token) + column);
    return eight;
  }
  __device__ __forceinline__ void put(bfloat16* tile, const Eight& eight) const {
    *reinterpret_cast<Pack<bfloat16>*>(tile + token * stride<N> + column) = eight.pack;
  }
};

// Zero above the diagonal, which stays or goes.
__device__ __forceinline__ Sum lower(Sum sum, bool diagonal) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (Sum::column(i) >= Sum::row(i) + (diagonal ? 1 : 0)) sum.values[i] = 0;
  return sum;
}

// A warp's 16 rows of a state, whose columns are multiplied by numbers of the chunk.
template <int N>
struct Rows {
  Sum sums[N / 16];

  __device__ __forceinline__ void get(const float* states, const Head<N>& at, int64_t number) {
    each([&](float& value, int row, int column) { value = states ? states[at.state(number) + int64_t(row) * N + column] : 0.0f; });
  }
  __device__ __forceinline__ void put(float* states, const Head<N>& at, int64_t number) {
    each([&](float& value, int row, int column) { states[at.state(number) + int64_t(row) * N + column] = value; });
  }
  __device__ __forceinline__ void multiply(const float* columns) {
    each([&](float& value, int, int column) { value *= columns[column]; });
  }
  // The same by 1 + columns.
  __device__ __forceinline__ void multiply_by_more(const float* columns) {
    each([&](float& value, int, int column) { value = value * columns[column] + value; });
  }
  // The tokens whose vectors are the rows of a tile, each times its number in the rows of `by` [value][token].
  __device__ __forceinline__ void add_tokens(const Left& by, const bfloat16* tile) {
#pragma unroll
    for (int part = 0; part < N / 16; ++part) add_product(sums[part], by, right_of(tile + part * 16, stride<N>));
  }
  // Rounded into a matrix [N][stride<N>].
  __device__ __forceinline__ void round_to(bfloat16* matrix) const {
#pragma unroll
    for (int part = 0; part < N / 16; ++part)
      kernels::put(matrix + warp_of() * 16 * stride<N> + part * 16, stride<N>, sums[part]);
  }
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) {
#pragma unroll
    for (int part = 0; part < N / 16; ++part)
#pragma unroll
      for (int i = 0; i < 8; ++i) visit(sums[part].values[i], warp_of() * 16 + Sum::row(i), part * 16 + Sum::column(i));
  }
};

// Zeros for the states that the sequence has room for, but no tokens: `number` and those behind it.
template <int N>
__device__ __forceinline__ void put_rest(float* kept, const Sequences& sequences, const Head<N>& at, int64_t number) {
  Rows<N> zeros;
  for (const int64_t last = at.end / segment_tokens + at.sequence; number <= last; ++number) zeros.put(kept, at, number);
}

// The states before the chunks of a segment, as left factors: each thread's own part of
// [sequences][heads][chunks_of_segment][N][N] bfloat16 numbers.
template <int N>
struct History {
  Left* own;
  __device__ __forceinline__ explicit History(void* of_blocks)
      : own(static_cast<Left*>(of_blocks) + int64_t(blockIdx.x) * chunks_of_segment * (N / 16) * num_threads<N> + threadIdx.x) {}
  __device__ __forceinline__ Left& operator()(int number, int part) const { return own[(number * (N / 16) + part) * num_threads<N>]; }
  // Into a matrix [N][stride<N>].
  __device__ __forceinline__ void get(int number, bfloat16* matrix) const {
#pragma unroll
    for (int part = 0; part < N / 16; ++part) {
      const Left rows = (*this)(number, part);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair)
        put_pair(matrix + (warp_of() * 16 + Sum::row(2 * pair)) * stride<N> + part * 16 + Sum::column(2 * pair), rows.pairs[pair]);
    }
  }
};

// Sums over values of the products of two matrices [N][stride<N>], for the warp's 16 columns.
template <int N>
__device__ __forceinline__ void sum_products(const bfloat16* one, const bfloat16* other, float* sums) {
  float products[2] = {};
  for (int value = lane_of() / 8; value < N; value += 4) {
    const int place = value * stride<N> + warp_of() * 16 + lane_of() % 8 * 2;
    const uint32_t left = get_pair(one + place), right = get_pair(other + place);
    products[0] += low_of(left) * low_of(right);
    products[1] += high_of(left) * high_of(right);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    products[i] += __shfl_xor_sync(whole_warp, products[i], 8);
    products[i] += __shfl_xor_sync(whole_warp, products[i], 16);
    if (lane_of() < 8) sums[warp_of() * 16 + lane_of() * 2 + i] = products[i];
  }
  __syncwarp();
}

// Writes what the warp left in `stage`, [16 tokens][16 columns] with stride `square`, to vectors of the tensor.
template <int N>
__device__ __forceinline__ void put_tokens(void* tensor, const Head<N>& at, int64_t first, const bfloat16* stage) {
  __syncwarp();
  const int token = lane_of() / 2, half = lane_of() % 2 * 8;
  if (first + token < at.end) {
    bfloat16* to = static_cast<bfloat16*>(tensor) + at.vector(first + token) + warp_of() * 16 + half;
    *reinterpret_cast<Pack<bfloat16>*>(to) = *reinterpret_cast<const Pack<bfloat16>*>(stage + token * square + half);
  }
  __syncwarp();
}
// The same of a product [16 values][16 tokens].
template <int N>
__device__ __forceinline__ void put_values(void* tensor, const Head<N>& at, int64_t first, const Sum& sum, bfloat16* stage) {
#pragma unroll
  for (int i = 0; i < 8; ++i) stage[Sum::column(i) * square + Sum::row(i)] = narrow<bfloat16>(sum.values[i]);
  put_tokens(tensor, at, first, stage);
}

// Calls run(integral constant N).
template <class Inputs, class Run>
void with_size(const Inputs& in, Run run) {
  if (in.sequences.count * in.sequences.heads == 0) return;
  if (in.size == 32) run(std::integral_constant<int, 32>{});
  if (in.size == 64) run(std::integral_constant<int, 64>{});
  if (in.size == 128) run(std::integral_constant<int, 128>{});
}

}  // namespace kernels
