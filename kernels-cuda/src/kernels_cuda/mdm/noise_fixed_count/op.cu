// A block of threads takes a sequence. It finds the k-th smallest draw bit by bit, highest first, by counting how many draws that agree
// with the bits found so far have a 0 in the next one; draws are made again for every count, which is cheaper than keeping them.
#include "op.h"

#include "../../include/cuda_rows.h"

namespace kernels {
namespace {

struct Count {
  using Real = int;
  int value;
};

__device__ __forceinline__ Count joined(Count left, Count right) { return {left.value + right.value}; }

// visit(place, draw) of every eligible token that is this thread's.
template <class Visit>
__device__ __forceinline__ void each_token(const Sequences& in, int64_t row, Visit visit) {
  const Random random = in.random(row);
  for (int64_t block = threadIdx.x; block < in.blocks(); block += row_threads) {
    uint32_t words[4];
    random.words(uint32_t(block), words);
    for (int lane = 0; lane < 4 && 4 * block + lane < in.size; ++lane)
      if (in.open(row, 4 * block + lane)) visit(4 * block + lane, words[lane]);
  }
}

// The number of eligible tokens for which `holds`, in every thread.
template <class Holds>
__device__ __forceinline__ int count(const Sequences& in, int64_t row, Holds holds) {
  Count mine{0};
  each_token(in, row, [&](int64_t place, uint32_t draw) { mine.value += holds(place, draw); });
  return joined_by_block(mine, Count{0}).value;
}

__global__ void __launch_bounds__(row_threads) count_kernel(Counting counting) {
  const Sequences& in = counting.of;
  const int64_t row = blockIdx.x;
  // rank of the last masked token among those that agree with what is known of its draw, and then of its place
  int rank = counting.k[row];
  uint32_t draw = 0;
  int64_t place = rank > 0 ? in.size : -1;
  if (rank > 0) {
    for (int bit = 31; bit >= 0; --bit) {
      const int below = count(in, row, [&](int64_t, uint32_t x) { return int(x >> bit == draw >> bit); });
      if (rank > below) {
        rank -= below;
        draw |= 1u << bit;
      }
    }
    if (count(in, row, [&](int64_t, uint32_t x) { return int(x == draw); }) > rank) {
      place = 0;
      int bits = 0;
      while (int64_t(1) << bits < in.size) ++bits;
      for (int bit = bits - 1; bit >= 0; --bit) {
        const int below = count(in, row, [&](int64_t at, uint32_t x) { return int(x == draw && at >> bit == place >> bit); });
        if (rank > below) {
          rank -= below;
          place |= int64_t(1) << bit;
        }
      }
    }
  }
  for (int64_t at = threadIdx.x; at < in.size; at += row_threads) in.masked[row * in.size + at] = false;
  __syncthreads();
  each_token(in, row, [&](int64_t at, uint32_t x) { in.masked[row * in.size + at] = x < draw || (x == draw && at <= place); });
}

}  // namespace

void mask_count(const Counting& in, void* stream) { LAUNCH(count_kernel, dim3(unsigned(in.of.rows)), dim3(row_threads), 0, stream)(in); }

}  // namespace kernels
