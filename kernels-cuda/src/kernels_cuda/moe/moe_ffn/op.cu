// T tokens, K slots, R rows, N experts, E neurons of an expert
#include <cmath>

#include "../../include/cuda_portable.h"
#include "op.h"

namespace kernels {
namespace {

constexpr int sort_threads = int(sort_rows), scan_threads = 256, num_warps = 8, combine_threads = 128;

__device__ __forceinline__ int nearest(int expert, int num_experts) {
  return expert < 0 ? 0 : expert >= num_experts ? num_experts - 1 : expert;
}

// A block's rows of each expert. Thread `expert` counts, so that no sum depends on an order.
__global__ void __launch_bounds__(sort_threads)
    count_kernel(const int32_t* experts_R, int64_t rows, int num_experts, int32_t* counts) {
  SHARED(int, mine, sort_threads);
  const int64_t row = int64_t(blockIdx.x) * sort_rows + threadIdx.x;
  mine[threadIdx.x] = row < rows ? nearest(experts_R[row], num_experts) : -1;
  __syncthreads();
  for (int expert = int(threadIdx.x); expert < num_experts; expert += sort_threads) {
    int count = 0;
    for (int i = 0; i < sort_threads; ++i) count += mine[i] == expert;
    counts[int64_t(blockIdx.x) * num_experts + expert] = count;
  }
}

// Counts become the places where a block's rows of an expert begin.
__global__ void __launch_bounds__(scan_threads) scan_kernel(int32_t* counts, int64_t num_blocks, int num_experts, int32_t* ends_N) {
  for (int expert = int(threadIdx.x); expert < num_experts; expert += scan_threads) {
    int32_t total = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int32_t count = counts[block * num_experts + expert];
      counts[block * num_experts + expert] = total;
      total += count;
    }
    ends_N[expert] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int expert = 1; expert < num_experts; ++expert) ends_N[expert] += ends_N[expert - 1];
}

__global__ void __launch_bounds__(sort_threads) place_kernel(const int32_t* experts_R, int64_t rows, int num_experts, const int32_t* counts,
                                                             const int32_t* ends_N, int32_t* order_R, int32_t* inverse_R) {
  SHARED(int, mine, sort_threads);
  const int64_t row = int64_t(blockIdx.x) * sort_rows + threadIdx.x;
  const int expert = row < rows ? nearest(experts_R[row], num_experts) : -1;
  mine[threadIdx.x] = expert;
  __syncthreads();
  if (expert < 0) return;
  int32_t place = counts[int64_t(blockIdx.x) * num_experts + expert] + (expert ? ends_N[expert - 1] : 0);
  for (int i = 0; i < int(threadIdx.x); ++i) place += mine[i] == expert;
  order_R[place] = int32_t(row);
  inverse_R[row] = place;
}

template <class T, int count>
struct alignas(sizeof(T) * count) Few {
  T values[count];
};

template <int size, class T>
__device__ __forceinline__ void load(const T* from, float* to) {
  const Few<T, size> few = *reinterpret_cast<const Few<T, size>*>(from);
#pragma unroll
  for (int i = 0; i < size; ++i) to[i] = widen(few.values[i]);
}

template <int size, class T>
__device__ __forceinline__ void store(T* to, const float* from) {
  Few<T, size> few;
#pragma unroll
  for (int i = 0; i < size; ++i) few.values[i] = narrow<T>(from[i]);
  *reinterpret_cast<Few<T, size>*>(to) = few;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// A warp takes a row; a lane takes `few` neighbours at a time.
template <class T, int few>
__global__ void __launch_bounds__(32 * num_warps)
    swiglu_kernel(const T* gate_up, const float* score, T* h, int64_t rows, int64_t size) {
  const int64_t row = int64_t(blockIdx.x) * num_warps + threadIdx.x / 32;
  if (row >= rows) return;
  const float by = score[row];
  for (int64_t i = threadIdx.x % 32 * few; i < size; i += 32 * few) {
    float gate[few], up[few];
    load<few>(gate_up + row * 2 * size + i, gate);
    load<few>(gate_up + row * 2 * size + size + i, up);
#pragma unroll
    for (int n = 0; n < few; ++n) gate[n] = gate[n] * sigmoid(gate[n]) * up[n] * by;
    store<few>(h + row * size + i, gate);
  }
}

template <class T, int few>
__global__ void __launch_bounds__(32 * num_warps)
    swiglu_backward_kernel(const T* gate_up, const float* score, const T* dh, T* h, T* dgate_up, float* dscore, int64_t rows, int64_t size) {
  const int64_t row = int64_t(blockIdx.x) * num_warps + threadIdx.x / 32;
  if (row >= rows) return;
  const float by = score[row];
  float of_score = 0;
  for (int64_t i = threadIdx.x % 32 * few; i < size; i += 32 * few) {
    float gate[few], up[few], gradient[few];
    load<few>(gate_up + row * 2 * size + i, gate);
    load<few>(gate_up + row * 2 * size + size + i, up);
    load<few>(dh + row * size + i, gradient);
    float out[few];
#pragma unroll
    for (int n = 0; n < few; ++n) {
      const float open = sigmoid(gate[n]), silu = gate[n] * open, slope = open * (1.0f + gate[n] * (1.0f - open));
      of_score += gradient[n] * (silu * up[n]);
      out[n] = silu * up[n] * by;
      gate[n] = gradient[n] * by * up[n] * slope;
      up[n] = gradient[n] * by * silu;
    }
    store<few>(h + row * size + i, out);
    store<few>(dgate_up + row * 2 * size + i, gate);
    store<few>(dgate_up + row * 2 * size + size + i, up);
  }
  for (int distance = 16; distance > 0; distance /= 2) of_score += __shfl_xor_sync(whole_warp, of_score, distance);
  if (threadIdx.x % 32 == 0) dscore[row] = of_score;
}

// A block takes a token.
template <class Out, class T, int few>
__global__ void __launch_bounds__(combine_threads) combine_kernel(Out* out, const T* rows, const int32_t* inverse_TK, int64_t slots,
                                                                  int64_t width, int64_t first, int64_t count, bool add) {
  const int64_t token = blockIdx.x;
  for (int64_t i = int64_t(threadIdx.x) * few; i < width; i += combine_threads * few) {
    float total[few];
#pragma unroll
    for (int n = 0; n < few; ++n) total[n] = add ? float(widen(out[token * width + i + n])) : 0.0f;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t row = inverse_TK[token * slots + slot] - first;
      if (row < 0 || row >= count) continue;
      float part[few];
      load<few>(rows + row * width + i, part);
#pragma unroll
      for (int n = 0; n < few; ++n) total[n] += part[n];
    }
#pragma unroll
    for (int n = 0; n < few; ++n) out[token * width + i + n] = narrow<Out>(total[n]);
  }
}

// Calls run(values that move in one instruction): 16 bytes of them where all pointers and lengths allow it, else one.
template <class T, class Run>
void with_few(int64_t length, std::initializer_list<const void*> pointers, Run run) {
  bool aligned = length % Pack<T>::size == 0;
  for (const void* pointer : pointers) aligned = aligned && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  if (aligned)
    run(std::integral_constant<int, Pack<T>::size>{});
  else
    run(std::integral_constant<int, 1>{});
}

dim3 blocks_of_warps(int64_t rows) { return dim3(unsigned((rows + num_warps - 1) / num_warps)); }

}  // namespace

void sort_tokens(const int32_t* experts_R, int64_t rows, int64_t num_experts, int32_t* counts, int32_t* order_R, int32_t* inverse_R,
                 int32_t* ends_N, void* stream) {
  const int64_t num_blocks = num_sort_blocks(rows);
  const dim3 grid(unsigned(num_blocks), 1, 1), block(sort_threads);
  if (num_blocks) LAUNCH(count_kernel, grid, block, 0, stream)(experts_R, rows, int(num_experts), counts);
  LAUNCH(scan_kernel, dim3(1), dim3(scan_threads), 0, stream)(counts, num_blocks, int(num_experts), ends_N);
  if (num_blocks)
    LAUNCH(place_kernel, grid, block, 0, stream)(experts_R, rows, int(num_experts), counts, ends_N, order_R, inverse_R);
}

void swiglu_score(const void* gate_up, Value type, const float* score, void* h, int64_t rows, int64_t size, void* stream) {
  if (rows * size == 0) return;
  with_value(type, [&](auto one) {
    using T = decltype(one);
    with_few<T>(size, {gate_up, h}, [&](auto few) {
      const auto kernel = swiglu_kernel<T, decltype(few)::value>;
      LAUNCH(kernel, blocks_of_warps(rows), dim3(32 * num_warps), 0, stream)
      (static_cast<const T*>(gate_up), score, static_cast<T*>(h), rows, size);
    });
  });
}

void swiglu_score_backward(const void* gate_up, Value type, const float* score, const void* dh, void* h, void* dgate_up, float* dscore,
                           int64_t rows, int64_t size, void* stream) {
  if (rows == 0) return;
  with_value(type, [&](auto one) {
    using T = decltype(one);
    with_few<T>(size, {gate_up, dh, h, dgate_up}, [&](auto few) {
      const auto kernel = swiglu_backward_kernel<T, decltype(few)::value>;
      LAUNCH(kernel, blocks_of_warps(rows), dim3(32 * num_warps), 0, stream)
      (static_cast<const T*>(gate_up), score, static_cast<const T*>(dh), static_cast<T*>(h), static_cast<T*>(dgate_up), dscore, rows, size);
    });
  });
}

void combine(void* out, bool wide_out, const void* rows, Value type, const int32_t* inverse_TK, int64_t tokens, int64_t slots,
             int64_t width, int64_t first, int64_t count, bool add, void* stream) {
  if (tokens * width == 0) return;
  with_value(type, [&](auto one) {
    using T = decltype(one);
    with_few<T>(width, {rows}, [&](auto few) {
      const auto run = [&](auto* to) {
        const auto kernel = combine_kernel<std::remove_pointer_t<decltype(to)>, T, decltype(few)::value>;
        LAUNCH(kernel, dim3(unsigned(tokens)), dim3(combine_threads), 0, stream)
        (to, static_cast<const T*>(rows), inverse_TK, slots, width, first, count, add);
      };
      if (wide_out)
        run(static_cast<float*>(out));
      else
        run(static_cast<T*>(out));
    });
  });
}

}  // namespace kernels
