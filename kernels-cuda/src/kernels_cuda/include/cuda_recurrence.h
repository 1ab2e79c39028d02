// What the kernels of recurrences share: one block for each head of each sequence. N head size.
#pragma once
#include <type_traits>

#include "cuda_portable.h"
#include "recurrence.h"

namespace kernels {

constexpr int tile_tokens = 8;  // that are in shared memory at a time; divides chunk_tokens
static_assert(chunk_tokens % tile_tokens == 0, "a chunk is made of tiles");

// A line (row or column) of a state is shared by `parts` neighbouring lanes, in packs of four that take turns, so that a warp reads
// vectors from shared memory without bank conflicts.
template <int N>
struct Layout {
  static constexpr int parts = N == 32 ? 2 : 4;
  static constexpr int threads = N * parts, share = N / parts;
  int line, part;
  __device__ __forceinline__ Layout() : line(threadIdx.x / parts), part(threadIdx.x % parts) {}
  // Place in the line of element i of this thread.
  __device__ __forceinline__ int place(int i) const { return (i / 4 * parts + part) * 4 + i % 4; }
  // The sum over the lanes of a line, the same in each of them.
  __device__ __forceinline__ float sum(float mine) const {
    for (int distance = parts / 2; distance > 0; distance /= 2) mine += __shfl_xor_sync(whole_warp, mine, distance);
    return mine;
  }
};

// One vector of every token of a tile.
template <int N>
struct Tile {
  Pack<float>* packs;
  static constexpr int count = tile_tokens * N / 4;
  __device__ __forceinline__ float& operator[](int i) const { return packs[i / 4].values[i % 4]; }
};

// Where the block's head lies.
template <int N>
struct Head {
  int64_t sequence, head, heads, begin, end;
  __device__ __forceinline__ explicit Head(const Sequences& sequences)
      : sequence(blockIdx.x / sequences.heads),
        head(blockIdx.x % sequences.heads),
        heads(sequences.heads),
        begin(sequences.begin(sequence)),
        end(sequences.end(sequence)) {}
  __device__ __forceinline__ int64_t vector(int64_t token) const { return (token * heads + head) * N; }
  __device__ __forceinline__ int64_t state(int64_t number) const { return (number * heads + head) * N * N; }
};

// Calls put(place in the tile, place in the tensors) for the tokens of the tile that count, and skip(place in the tile) for others.
template <int N, class Put, class Skip>
__device__ __forceinline__ void each_in_tile(const Head<N>& at, const Sequences& sequences, int64_t first, Put put, Skip skip) {
#pragma unroll 1
  for (int i = threadIdx.x; i < tile_tokens * N; i += Layout<N>::threads) {
    const int64_t token = first + i / N;
    if (token < at.end && sequences.counts(token))
      put(i, at.vector(token) + i % N);
    else
      skip(i);
  }
}

// This thread's part of a row of the state with this number.
template <int N>
__device__ __forceinline__ void put_row(float* states, const Head<N>& at, int64_t number, const Layout<N>& layout, const float* row) {
  float* to = states + at.state(number) + layout.line * N;
#pragma unroll
  for (int i = 0; i < Layout<N>::share; ++i) to[layout.place(i)] = row[i];
}

// That of the sequence's state; zero without states.
template <int N>
__device__ __forceinline__ void get_row(const float* states, const Head<N>& at, const Layout<N>& layout, float* row) {
  const float* from = states + at.state(at.sequence) + layout.line * N;
#pragma unroll
  for (int i = 0; i < Layout<N>::share; ++i) row[i] = states ? from[layout.place(i)] : 0.0f;
}

// Calls run(T{}, integral constant N).
template <class Inputs, class Run>
void with_kind(const Inputs& in, Run run) {
  const auto with_size = [&](auto type) {
    if (in.size == 32) run(type, std::integral_constant<int, 32>{});
    if (in.size == 64) run(type, std::integral_constant<int, 64>{});
    if (in.size == 128) run(type, std::integral_constant<int, 128>{});
  };
  if (in.sequences.count * in.sequences.heads == 0) return;
  if (in.type == Float::float32)
    with_size(float{});
  else
    with_size(bfloat16{});
}

template <class Inputs>
dim3 blocks(const Inputs& in) {
  return dim3(unsigned(in.sequences.count * in.sequences.heads));
}

}  // namespace kernels
