// A block takes one split of one group: a few lanes share a key (neighbouring lanes read neighbouring numbers), so that its scores with all
// heads of the group cost one reading; then a warp makes each head's softmax, and threads own columns of the values. A second kernel joins
// the splits of each head in their order.
#include <cmath>

#include "op.h"

#include "../../include/cuda_portable.h"

namespace kernels {
namespace {

constexpr int threads = 128, warps = threads / 32;
constexpr int64_t split_keys = DecodeAttention::split;

template <class T, int width>
struct alignas(sizeof(T) * width) Numbers {
  T values[width];
};

template <class Real>
__device__ __forceinline__ Real sum_over(Real value, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(whole_warp, value, distance);
  return value;
}

template <class Real>
__device__ __forceinline__ Real largest_of_warp(Real value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const Real other = __shfl_xor_sync(whole_warp, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// Rows of threads that share the keys of a split in the second half, and the columns of a row.
struct Columns {
  int packs, rows;
  KERNELS_FN Columns(int64_t size, int width) : packs(int(size) / width), rows(packs < threads ? threads / packs : 1) {}
};

// `width` numbers move at once; `most` heads share a reading.
template <class T, int width, int most>
__global__ void __launch_bounds__(threads) split_kernel(DecodeAttention in) {
  using Real = Wide<T>;
  // a division of long words costs a call, and registers saved around it; these are small
  const unsigned groups = unsigned(in.groups), size = unsigned(in.size);
  const int64_t number = blockIdx.x, b = blockIdx.y / groups, g = blockIdx.y % groups, splits = in.splits();
  const Split split(in, b, number);
  const int64_t count = split.last - split.first;
  const Columns columns(in.size, width);
  const Rows k = in.k[split.segment], v = in.v[split.segment];
  SHARED(Real, scores, most* split_keys);
  SHARED(Real, totals, most);
  DYNAMIC_PART(Real, queries, most* in.size, 0);
  DYNAMIC_PART(Real, sums, most* columns.rows* in.size, sizeof(Real) * size_t(most * in.size));
  int team = 1;
  while (team < columns.packs && team < 32) team *= 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t head = 0; head < in.each; head += most) {
    const int64_t row = (b * in.groups + g) * in.each + head;
    const int64_t heads = in.each - head < most ? in.each - head : most;
    Real* const lses = static_cast<Real*>(in.lses) + row * splits + number;
    if (count <= 0) {
      if (int64_t(threadIdx.x) < heads) lses[threadIdx.x * splits] = -INFINITY;
      continue;
    }
    __syncthreads();  // an earlier round is still read
    for (unsigned i = threadIdx.x; i < most * size; i += threads) {
      const int64_t h = i / size;
      queries[i] = h < heads ? widen(in.q.row<T>(b, g, head + h)[i % size]) * Real(in.scale) : Real(0);
    }
    __syncthreads();
    for (int64_t begin = 0; begin < count; begin += threads / team) {
      const int64_t n = begin + threadIdx.x / team;
      Real found[most];
#pragma unroll
      for (int h = 0; h < most; ++h) found[h] = 0;
      if (n < count) {
        const auto* const key = reinterpret_cast<const Numbers<T, width>*>(k.row<T>(b, g, split.first + n));
#pragma unroll 1
        for (int p = lane % team; p < columns.packs; p += team) {
          const Numbers<T, width> part = key[p];
#pragma unroll
          for (int i = 0; i < width; ++i) {
#pragma unroll
            for (int h = 0; h < most; ++h) found[h] += widen(part.values[i]) * queries[h * in.size + p * width + i];
          }
        }
      }
#pragma unroll
      for (int h = 0; h < most; ++h) {
        found[h] = sum_over(found[h], team);
        if (n < count && lane % team == 0) scores[h * split_keys + n] = found[h];
      }
    }
    __syncthreads();
    for (int64_t h = warp; h < heads; h += warps) {
      Real* const own = scores + h * split_keys;
      Real highest = -INFINITY, total = 0;
      for (int64_t n = lane; n < count; n += 32) highest = own[n] > highest ? own[n] : highest;
      highest = largest_of_warp(highest);
      for (int64_t n = lane; n < count; n += 32) total += own[n] = exp(own[n] - highest);
      total = sum_over(total, 32);
      if (lane == 0) {
        totals[h] = total;
        lses[h * splits] = highest + log(total);
      }
    }
    __syncthreads();
    const int thread = int(threadIdx.x), own_row = columns.rows > 1 ? thread / columns.packs : 0;
    const int first = columns.rows > 1 ? thread % columns.packs : thread, step = columns.rows > 1 ? columns.packs : threads;
    for (int p = first; own_row < columns.rows && p < columns.packs; p += step) {
      Real found[most][width];
#pragma unroll
      for (int h = 0; h < most; ++h) {
#pragma unroll
        for (int i = 0; i < width; ++i) found[h][i] = 0;
      }
#pragma unroll 1
      for (int64_t n = own_row; n < count; n += columns.rows) {
        const Numbers<T, width> part = reinterpret_cast<const Numbers<T, width>*>(v.row<T>(b, g, split.first + n))[p];
#pragma unroll
        for (int h = 0; h < most; ++h) {
          const Real weight = h < heads ? scores[h * split_keys + n] : Real(0);
#pragma unroll
          for (int i = 0; i < width; ++i) found[h][i] += weight * widen(part.values[i]);
        }
      }
#pragma unroll
      for (int h = 0; h < most; ++h) {
#pragma unroll
        for (int i = 0; i < width; ++i) sums[(h * columns.rows + own_row) * in.size + p * width + i] = found[h][i];
      }
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < heads * size; i += threads) {
      const int64_t h = i / size, j = i % size;
      Real found = 0;
      for (int r = 0; r < columns.rows; ++r) found += sums[(h * columns.rows + r) * in.size + j];
      static_cast<Real*>(in.parts)[((row + h) * splits + number) * in.size + j] = found / totals[h];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(threads) join_kernel(DecodeAttention in) {
  using Real = Wide<T>;
  const int64_t row = blockIdx.x, splits = in.splits();
  const Real* const lses = static_cast<const Real*>(in.lses) + row * splits;
  const Real* const parts = static_cast<const Real*>(in.parts) + row * splits * in.size;
  Real highest = -INFINITY, total = 0;
  for (int64_t s = 0; s < splits; ++s) highest = lses[s] > highest ? lses[s] : highest;
  const bool some = highest > Real(-INFINITY);
  for (int64_t s = 0; some && s < splits; ++s) total += exp(lses[s] - highest);
  if (threadIdx.x == 0) static_cast<Real*>(in.lse)[row] = some ? highest + log(total) : Real(-INFINITY);
  for (int64_t j = threadIdx.x; j < in.size; j += threads) {
    Real found = 0;
    // a split without keys was never written
    for (int64_t s = 0; s < splits; ++s)
      if (lses[s] > Real(-INFINITY)) found += parts[s * in.size + j] * (exp(lses[s] - highest) / total);
    static_cast<T*>(in.out)[row * in.size + j] = narrow<T>(found);
  }
}

template <class T, int width, int most>
void split_by(const DecodeAttention& in, void* stream) {
  const Columns columns(in.size, width);
  const size_t shared = sizeof(Wide<T>) * size_t(most * in.size * (1 + columns.rows));
  const auto kernel = split_kernel<T, width, most>;
  LAUNCH(kernel, dim3(unsigned(in.splits()), unsigned(in.batch * in.groups)), dim3(threads), shared, stream)(in);
}

// Whether every row of every segment begins where 16 bytes may.
template <class T>
bool aligned(const DecodeAttention& in) {
  bool found = in.size * int64_t(sizeof(T)) % 16 == 0;
  for (int segment = 0; segment < 2; ++segment) {
    for (const Rows& x : {in.k[segment], in.v[segment]}) {
      const int64_t spread = x.batch_stride | x.head_stride | x.stride;
      found = found && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && spread * int64_t(sizeof(T)) % 16 == 0;
    }
  }
  return found;
}

}  // namespace

void decode_attention(const DecodeAttention& in, void* stream) {
  if (in.batch * in.groups * in.each * in.size == 0) return;
  with_type(in.type, [&](auto one) {
    using T = decltype(one);
    constexpr int wide = 16 / sizeof(T);
    if (in.splits() > 0) {
      const bool whole = aligned<T>(in);
      if (in.each == 1) whole ? split_by<T, wide, 1>(in, stream) : split_by<T, 1, 1>(in, stream);
      if (in.each > 1) whole ? split_by<T, wide, 4>(in, stream) : split_by<T, 1, 4>(in, stream);
    }
    const auto kernel = join_kernel<T>;
    LAUNCH(kernel, dim3(unsigned(in.batch * in.groups * in.each)), dim3(threads), 0, stream)(in);
  });
}

}  // namespace kernels
