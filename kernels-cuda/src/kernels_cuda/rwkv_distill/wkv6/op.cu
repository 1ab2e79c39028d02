// The recurrence in float32, token by token: one block for each head of each sequence. N head size.
#include <cmath>

#include "../../include/cuda_recurrence.h"
#include "op.h"

namespace kernels {
namespace {

struct Decay {
  float less_one, slope;  // decay - 1 (so that a slow decay keeps its digits), and the derivative with respect to the logit
};

__device__ __forceinline__ Decay decay_of(float logit) {
  // e^88 is finite, and its decay is 0 already; a NaN stays one
  const float logarithm = -expf(logit > 88.0f ? 88.0f : logit);
  return {expm1f(logarithm), logarithm * expf(logarithm)};
}

// Threads hold rows of the state, the lines of values.
// The 1 (block at least per multiprocessor) keeps ptxas from spilling two registers to make room for more blocks.
template <class T, int N>
__global__ void __launch_bounds__(Layout<N>::threads, 1) forward_kernel(Wkv6 in, const float* initial, T* y, float* final, float* kept) {
  constexpr int share = Layout<N>::share, count = Tile<N>::count;
  SHARED(Pack<float>, r_packs, count);
  SHARED(Pack<float>, k_packs, count);
  SHARED(Pack<float>, uk_packs, count);
  SHARED(Pack<float>, v_packs, count);
  SHARED(Pack<float>, decay_packs, count);
  const Tile<N> r{r_packs}, k{k_packs}, uk{uk_packs}, v{v_packs}, decay{decay_packs};
  const Layout<N> layout;
  const Head<N> at(in.sequences);

  float state[share];
  const auto put_state = [&](float* states, int64_t number) { put_row(states, at, number, layout, state); };
  get_row(initial, at, layout, state);

  int64_t chunk = in.sequences.first_chunk(at.sequence);
  for (int64_t first = at.begin; first < at.end; first += tile_tokens) {
    if (kept && (first - at.begin) % chunk_tokens == 0) put_state(kept, chunk++);
    __syncthreads();
    each_in_tile(
        at, in.sequences, first,
        [&](int i, int64_t from) {
          r[i] = widen(static_cast<const T*>(in.r)[from]);
          const float key = widen(static_cast<const T*>(in.k)[from]);
          k[i] = key;
          uk[i] = key * widen(static_cast<const T*>(in.u)[at.head * N + i % N]);
          v[i] = widen(static_cast<const T*>(in.v)[from]);
          decay[i] = decay_of(widen(static_cast<const T*>(in.w)[from])).less_one;
        },
        [&](int i) { r[i] = k[i] = uk[i] = v[i] = decay[i] = 0; });
    __syncthreads();
    const int tokens = int(at.end - first < tile_tokens ? at.end - first : tile_tokens);
    for (int t = 0; t < tokens; ++t) {
      const float value = v[t * N + layout.line];
      float result = 0, bonus = 0;
#pragma unroll
      for (int i = 0; i < share; ++i) {
        const int key = t * N + layout.place(i);
        float s = state[i];
        result += s * r[key];
        bonus += uk[key] * r[key];
        s = s * decay[key] + s;
        s += value * k[key];
        state[i] = s;
      }
      result = layout.sum(result + value * bonus);
      if (layout.part == 0) y[at.vector(first + t) + layout.line] = narrow<T>(result);
    }
  }
  if (final) put_state(final, at.sequence);
  if (kept) {
#pragma unroll
    for (int i = 0; i < share; ++i) state[i] = 0;
    const int64_t last = at.end / chunk_tokens + at.sequence;
    while (chunk <= last) put_state(kept, chunk++);
  }
}

// Sums over keys need rows of the state's gradient and sums over values need columns, so each thread holds a part of a row and of a
// column: both change alike. `history` holds the states of a chunk by columns, and every thread reads only what it wrote.
template <class T, int N>
__global__ void __launch_bounds__(Layout<N>::threads)
    backward_kernel(Wkv6 in, const float* kept, const T* dy_tokens, const float* dfinal, float* history_of_blocks, Wkv6Gradients out) {
  constexpr int share = Layout<N>::share, threads = Layout<N>::threads, count = Tile<N>::count;
  SHARED(Pack<float>, r_packs, count);
  SHARED(Pack<float>, k_packs, count);
  SHARED(Pack<float>, uk_packs, count);
  SHARED(Pack<float>, v_packs, count);
  SHARED(Pack<float>, decay_packs, count);
  SHARED(Pack<float>, slope_packs, count);
  SHARED(Pack<float>, dy_packs, count);
  const Tile<N> r{r_packs}, k{k_packs}, uk{uk_packs}, v{v_packs}, decay{decay_packs}, slope{slope_packs}, dy{dy_packs};
  const Layout<N> layout;
  const Head<N> at(in.sequences);
  const auto load_tile = [&](int64_t first) {
    __syncthreads();
    each_in_tile(
        at, in.sequences, first,
        [&](int i, int64_t from) {
          r[i] = widen(static_cast<const T*>(in.r)[from]);
          const float key = widen(static_cast<const T*>(in.k)[from]);
          k[i] = key;
          uk[i] = key * widen(static_cast<const T*>(in.u)[at.head * N + i % N]);
          v[i] = widen(static_cast<const T*>(in.v)[from]);
          const Decay of_token = decay_of(widen(static_cast<const T*>(in.w)[from]));
          decay[i] = of_token.less_one;
          slope[i] = of_token.slope;
          dy[i] = widen(dy_tokens[from]);
        },
        [&](int i) { r[i] = k[i] = uk[i] = v[i] = decay[i] = slope[i] = dy[i] = 0; });
    __syncthreads();
  };
  float* history = history_of_blocks + int64_t(blockIdx.x) * (chunk_tokens + 1) * N * N + threadIdx.x;

  // registers suffice for one line of the longest kind, but not for two
  constexpr bool column_in_memory = share > 16;
  float drow[share], registers[column_in_memory ? 1 : share];
  const auto dcolumn = [&](int i) -> float& {
    if constexpr (column_in_memory)
      return history[(chunk_tokens * share + i) * threads];
    else
      return registers[i];
  };
#pragma unroll
  for (int i = 0; i < share; ++i) {
    const int64_t states = at.state(at.sequence);
    drow[i] = dfinal ? dfinal[states + layout.line * N + layout.place(i)] : 0.0f;
    dcolumn(i) = dfinal ? dfinal[states + layout.place(i) * N + layout.line] : 0.0f;
  }
  const float of_u = widen(static_cast<const T*>(in.u)[at.head * N + layout.line]);
  float du = 0;
  const int64_t chunks = (at.end - at.begin + chunk_tokens - 1) / chunk_tokens;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t begin = at.begin + chunk * chunk_tokens;
    const int tokens = int(at.end - begin < chunk_tokens ? at.end - begin : chunk_tokens);
    const float* state = kept + at.state(in.sequences.first_chunk(at.sequence) + chunk) + layout.line;
#pragma unroll 1
    for (int i = 0; i < share; ++i) history[i * threads] = state[layout.place(i) * N];
    for (int first = 0; first < tokens; first += tile_tokens) {
      load_tile(begin + first);
      const int in_tile = tokens - first < tile_tokens ? tokens - first : tile_tokens;
#pragma unroll 1
      for (int i = 0; i < share; ++i) {
        const int place = layout.place(i);
        float s = history[(first * share + i) * threads];
#pragma unroll 1
        for (int t = 0; t < in_tile; ++t) {
          const int key = t * N + layout.line;
          s = s * decay[key] + s;
          s += v[t * N + place] * k[key];
          if (first + t + 1 < tokens) history[((first + t + 1) * share + i) * threads] = s;
        }
      }
    }
    for (int first = (tokens - 1) / tile_tokens * tile_tokens; first >= 0; first -= tile_tokens) {
      load_tile(begin + first);
      const int in_tile = tokens - first < tile_tokens ? tokens - first : tile_tokens;
#pragma unroll 1
      for (int t = in_tile - 1; t >= 0; --t) {
        const int64_t to = at.vector(begin + first + t) + layout.line;
        const int own = t * N + layout.line;
        {
          float dvalue = 0;
          const float of_value = dy[own];
#pragma unroll
          for (int i = 0; i < share; ++i) {
            const int key = t * N + layout.place(i);
            dvalue += drow[i] * k[key] + of_value * (uk[key] * r[key]);
            drow[i] = drow[i] * decay[key] + drow[i] + of_value * r[key];
          }
          dvalue = layout.sum(dvalue);
          if (layout.part == 0) static_cast<T*>(out.v)[to] = narrow<T>(dvalue);
        }
        {
          float dr = 0, dd = 0, dk = 0, dbonus = 0;
          const float of_r = r[own], of_decay = decay[own];
#pragma unroll
          for (int i = 0; i < share; ++i) {
            const int value = t * N + layout.place(i);
            const float before = history[((first + t) * share + i) * threads], dx = dcolumn(i);
            dr += before * dy[value];
            dd += dx * before;
            dk += dx * v[value];
            dbonus += v[value] * dy[value];
            dcolumn(i) = dx * of_decay + dx + dy[value] * of_r;
          }
          dr = layout.sum(dr);
          dd = layout.sum(dd);
          dk = layout.sum(dk);
          dbonus = layout.sum(dbonus);
          du += k[own] * of_r * dbonus;
          if (layout.part == 0) {
            static_cast<T*>(out.r)[to] = narrow<T>(dr + uk[own] * dbonus);
            static_cast<T*>(out.k)[to] = narrow<T>(dk + of_u * of_r * dbonus);
            static_cast<T*>(out.w)[to] = narrow<T>(dd * slope[own]);
          }
        }
      }
    }
  }
  if (layout.part == 0) out.u[(at.sequence * at.heads + at.head) * N + layout.line] = du;
  if (out.initial) put_row(out.initial, at, at.sequence, layout, drow);
}

}  // namespace

void wkv6_forward(const Wkv6& in, const float* initial, void* y, float* final, float* kept, void* stream) {
  with_kind(in, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int N = decltype(size)::value;
    const auto kernel = forward_kernel<T, N>;
    LAUNCH(kernel, blocks(in), dim3(Layout<N>::threads), 0, stream)(in, initial, static_cast<T*>(y), final, kept);
  });
}

void wkv6_backward(const Wkv6& in, const float* kept, const void* dy, const float* dfinal, float* history, const Wkv6Gradients& out,
                   void* stream) {
  with_kind(in, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int N = decltype(size)::value;
    const auto kernel = backward_kernel<T, N>;
    LAUNCH(kernel, blocks(in), dim3(Layout<N>::threads), 0, stream)(in, kept, static_cast<const T*>(dy), dfinal, history, out);
  });
}

void wkv6_step(const Wkv6& in, float* state, void* y, void* stream) { wkv6_forward(in, state, y, state, nullptr, stream); }

}  // namespace kernels
