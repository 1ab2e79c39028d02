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
  const float factor = -0.606530659712633424f;  // -exp(-1/2)
  const float small = expf(-fabsf(logit)), large_sigmoid = 1.0f / (1.0f + small), small_sigmoid = small * large_sigmoid;
  const float less_one = expm1f(factor * (logit > 0 ? large_sigmoid : small_sigmoid));
  return {less_one, factor * (1.0f + less_one) * large_sigmoid * small_sigmoid};
}

// Threads hold rows of the state, the lines of values.
template <class T, int N>
__global__ void __launch_bounds__(Layout<N>::threads)
    forward_kernel(Wkv7 in, const float* initial, T* y, float* final, float* kept, float* removed) {
  constexpr int share = Layout<N>::share, count = Tile<N>::count;
  SHARED(Pack<float>, r_packs, count);
  SHARED(Pack<float>, decay_packs, count);
  SHARED(Pack<float>, k_packs, count);
  SHARED(Pack<float>, a_packs, count);
  SHARED(Pack<float>, b_packs, count);
  SHARED(Pack<float>, v_packs, count);
  const Tile<N> r{r_packs}, decay{decay_packs}, k{k_packs}, a{a_packs}, b{b_packs}, v{v_packs};
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
          decay[i] = decay_of(widen(static_cast<const T*>(in.w)[from])).less_one;
          k[i] = widen(static_cast<const T*>(in.k)[from]);
          v[i] = widen(static_cast<const T*>(in.v)[from]);
          a[i] = widen(static_cast<const T*>(in.a)[from]);
          b[i] = widen(static_cast<const T*>(in.b)[from]);
        },
        [&](int i) { r[i] = decay[i] = k[i] = v[i] = a[i] = b[i] = 0; });
    __syncthreads();
    const int tokens = int(at.end - first < tile_tokens ? at.end - first : tile_tokens);
    for (int t = 0; t < tokens; ++t) {
      float old = 0, result = 0;
#pragma unroll
      for (int i = 0; i < share; ++i) old += state[i] * a[t * N + layout.place(i)];
      old = layout.sum(old);
      const float value = v[t * N + layout.line];
#pragma unroll
      for (int i = 0; i < share; ++i) {
        const int key = t * N + layout.place(i);
        float s = state[i];
        s = s * decay[key] + s;
        s += old * b[key];
        s += value * k[key];
        state[i] = s;
        result += s * r[key];
      }
      result = layout.sum(result);
      if (layout.part == 0) {
        const int64_t to = at.vector(first + t) + layout.line;
        y[to] = narrow<T>(result);
        if (removed) removed[to] = old;
      }
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
// column: both change alike. The states of a chunk are computed by columns, too, whose rows do not depend on one another once S a is
// known; `history` holds them, and every thread reads only what it wrote.
template <class T, int N>
__global__ void __launch_bounds__(Layout<N>::threads)
    backward_kernel(Wkv7 in, const float* kept, const float* removed_tokens, const T* dy_tokens, const float* dfinal,
                    float* history_of_blocks, Wkv7Gradients out) {
  constexpr int share = Layout<N>::share, threads = Layout<N>::threads, count = Tile<N>::count;
  SHARED(Pack<float>, r_packs, count);
  SHARED(Pack<float>, decay_packs, count);
  SHARED(Pack<float>, slope_packs, count);
  SHARED(Pack<float>, k_packs, count);
  SHARED(Pack<float>, a_packs, count);
  SHARED(Pack<float>, b_packs, count);
  SHARED(Pack<float>, v_packs, count);
  SHARED(Pack<float>, removed_packs, count);
  SHARED(Pack<float>, dy_packs, count);
  SHARED(float, dremoved_of_token, 2 * N);
  const Tile<N> r{r_packs}, decay{decay_packs}, slope{slope_packs}, k{k_packs}, a{a_packs}, b{b_packs}, v{v_packs}, removed{removed_packs},
      dy{dy_packs};
  const Layout<N> layout;
  const Head<N> at(in.sequences);
  const auto load_tile = [&](int64_t first) {
    __syncthreads();
    each_in_tile(
        at, in.sequences, first,
        [&](int i, int64_t from) {
          r[i] = widen(static_cast<const T*>(in.r)[from]);
          const Decay of_token = decay_of(widen(static_cast<const T*>(in.w)[from]));
          decay[i] = of_token.less_one;
          slope[i] = of_token.slope;
          k[i] = widen(static_cast<const T*>(in.k)[from]);
          v[i] = widen(static_cast<const T*>(in.v)[from]);
          a[i] = widen(static_cast<const T*>(in.a)[from]);
          b[i] = widen(static_cast<const T*>(in.b)[from]);
          removed[i] = removed_tokens[from];
          dy[i] = widen(dy_tokens[from]);
        },
        [&](int i) { r[i] = decay[i] = slope[i] = k[i] = v[i] = a[i] = b[i] = removed[i] = dy[i] = 0; });
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
          s += removed[t * N + place] * b[key];
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
        // two buffers: the next token may write while this one is still read
        float* dremoved = dremoved_of_token + t % 2 * N;
        const int64_t to = at.vector(begin + first + t) + layout.line;
        const int own = t * N + layout.line;
        {
          float dvalue = 0, dold = 0;
          const float of_value = dy[own];
#pragma unroll
          for (int i = 0; i < share; ++i) {
            const int key = t * N + layout.place(i);
            const float dx = drow[i] + of_value * r[key];
            drow[i] = dx;
            dvalue += dx * k[key];
            dold += dx * b[key];
          }
          dvalue = layout.sum(dvalue);
          dold = layout.sum(dold);
          if (layout.part == 0) {
            static_cast<T*>(out.v)[to] = narrow<T>(dvalue);
            dremoved[layout.line] = dold;
          }
#pragma unroll
          for (int i = 0; i < share; ++i) {
            const int key = t * N + layout.place(i);
            drow[i] = drow[i] * decay[key] + drow[i] + dold * a[key];
          }
        }
        __syncthreads();
        {
          float dr = 0, dd = 0, dk = 0, da = 0, db = 0;
          const float of_r = r[own], of_decay = decay[own], of_k = k[own], of_a = a[own], of_b = b[own];
#pragma unroll
          for (int i = 0; i < share; ++i) {
            const int value = t * N + layout.place(i);
            const float before = history[((first + t) * share + i) * threads];
            float after = before * of_decay + before;
            after += removed[value] * of_b;
            after += v[value] * of_k;
            const float dx = dcolumn(i) + dy[value] * of_r, dold = dremoved[layout.place(i)];
            dr += after * dy[value];
            dd += dx * before;
            dk += dx * v[value];
            db += dx * removed[value];
            da += before * dold;
            dcolumn(i) = dx * of_decay + dx + dold * of_a;
          }
          dr = layout.sum(dr);
          dd = layout.sum(dd);
          dk = layout.sum(dk);
          da = layout.sum(da);
          db = layout.sum(db);
          if (layout.part == 0) {
            static_cast<T*>(out.r)[to] = narrow<T>(dr);
            static_cast<T*>(out.w)[to] = narrow<T>(dd * slope[own]);
            static_cast<T*>(out.k)[to] = narrow<T>(dk);
            static_cast<T*>(out.a)[to] = narrow<T>(da);
            static_cast<T*>(out.b)[to] = narrow<T>(db);
          }
        }
      }
    }
  }
  if (out.initial) put_row(out.initial, at, at.sequence, layout, drow);
}

}  // namespace

void wkv7_forward(const Wkv7& in, const float* initial, void* y, float* final, float* kept, float* removed, void* stream) {
  with_kind(in, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int N = decltype(size)::value;
    const auto kernel = forward_kernel<T, N>;
    LAUNCH(kernel, blocks(in), dim3(Layout<N>::threads), 0, stream)(in, initial, static_cast<T*>(y), final, kept, removed);
  });
}

void wkv7_backward(const Wkv7& in, const float* kept, const float* removed, const void* dy, const float* dfinal, float* history,
                   const Wkv7Gradients& out, void* stream) {
  with_kind(in, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int N = decltype(size)::value;
    const auto kernel = backward_kernel<T, N>;
    LAUNCH(kernel, blocks(in), dim3(Layout<N>::threads), 0, stream)
    (in, kept, removed, static_cast<const T*>(dy), dfinal, history, out);
  });
}

void wkv7_step(const Wkv7& in, float* state, void* y, void* stream) { wkv7_forward(in, state, y, state, nullptr, nullptr, stream); }

}  // namespace kernels
