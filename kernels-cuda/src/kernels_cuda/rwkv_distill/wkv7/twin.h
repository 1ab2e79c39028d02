// The CPU twin of op.cu, compiled once per instruction set (cpu_levels.h). Tokens go through one head of one sequence one by one.
// N head size; key numbers the columns of a state, value its rows.
#include "../../include/cpu_recurrence.h"

// The decay less one (so that a slow decay keeps its digits) and its derivative with respect to the logit.
struct Decay {
  floats less_one, slope;

  explicit Decay(floats logit) {
    const floats factor = splat(-0.606530659712633424f);  // -exp(-1/2)
    const floats small = exponential(logit > 0 ? -logit : logit);
    const floats large_sigmoid = 1.0f / (1.0f + small), small_sigmoid = small * large_sigmoid;
    const floats sigmoid = logit > 0 ? large_sigmoid : small_sigmoid;
    less_one = exponential_minus_one(factor * sigmoid);
    slope = factor * (1.0f + less_one) * (large_sigmoid * small_sigmoid);
  }
};

// One token for `width` values. The state is [key][width]. `removed` is S a before and becomes (new S) next_a.
template <int N, int width>
inline void update(float* state, const float* r, const float* decay, const float* k, const float* b, const float* next_a, const float* v,
                   float* removed, float* y) {
  constexpr int count = width / lanes;
  floats values[count], old[count], sums_y[count], next[count];
#pragma GCC unroll 16
  for (int j = 0; j < count; ++j) {
    values[j] = load(v + j * lanes);
    old[j] = load(removed + j * lanes);
    sums_y[j] = next[j] = splat(0);
  }
  for (int key = 0; key < N; ++key) {
    const floats rk = splat(r[key]), dk = splat(decay[key]), kk = splat(k[key]), bk = splat(b[key]), ak = splat(next_a[key]);
#pragma GCC unroll 16
    for (int j = 0; j < count; ++j) {
      float* place = state + key * width + j * lanes;
      floats s = load(place);
      s = s * dk + s;
      s += old[j] * bk;
      s += values[j] * kk;
      store(place, s);
      sums_y[j] += s * rk;
      next[j] += s * ak;
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < count; ++j) {
    store(y + j * lanes, sums_y[j]);
    store(removed + j * lanes, next[j]);
  }
}

template <int N>
struct ForwardScratch {
  StateByKeys<N> state;
  alignas(64) float r[chunk_tokens][N], decay[chunk_tokens][N], k[chunk_tokens][N], b[chunk_tokens][N], next_a[chunk_tokens][N],
      v[chunk_tokens][N], y[chunk_tokens][N];
  alignas(64) float removed[N];
};

template <int N>
void forward_head(const Wkv7& in, int64_t sequence, int64_t head, const float* initial, void* y, float* final, float* kept,
                  float* kept_removed) {
  using Scratch = ForwardScratch<N>;
  constexpr int width = StateByKeys<N>::width;
  const auto memory = std::make_unique<Scratch>();
  Scratch& at = *memory;
  const Sequences& sequences = in.sequences;
  const HeadTokens<N> tokens(sequences, sequence, head);
  const int64_t count = tokens.count, states = tokens.states;

  memset(at.state.parts_of, 0, sizeof at.state.parts_of);
  memset(at.removed, 0, sizeof at.removed);
  if (initial) {
    at.state.set(initial + states);
    if (count) {
      widen_row(at.next_a[0], in.a, in.type, tokens.place(0), N);
      for (int value = 0; value < N; ++value) {
        floats total = splat(0);
        each_vector(N, [&](int64_t i) { total += load(initial + states + value * N + i) * load(at.next_a[0] + i); });
        at.removed[value] = float(sum(total));
      }
    }
  }
  int64_t chunk = sequences.first_chunk(sequence);
  for (int64_t first = 0; first < count; first += chunk_tokens, ++chunk) {
    const int size = int(std::min<int64_t>(chunk_tokens, count - first));
    if (kept) at.state.get(kept + (chunk * sequences.heads + head) * N * N);
    for (int t = 0; t < size; ++t) {
      const int64_t offset = tokens.place(first + t);
      widen_row(at.r[t], in.r, in.type, offset, N);
      widen_row(at.decay[t], in.w, in.type, offset, N);
      widen_row(at.k[t], in.k, in.type, offset, N);
      widen_row(at.v[t], in.v, in.type, offset, N);
      widen_row(at.b[t], in.b, in.type, offset, N);
      replace_by_decays<Decay>(at.decay[t], nullptr, N);
      if (first + t + 1 < count)
        widen_row(at.next_a[t], in.a, in.type, tokens.place(first + t + 1), N);
      else
        memset(at.next_a[t], 0, sizeof at.next_a[t]);
    }
    for (int part = 0; part < N / width; ++part) {
      const int from = part * width;
      for (int t = 0; t < size; ++t) {
        const int64_t ahead = first + chunk_tokens + t;
        if (part == 0 && ahead < count) fetch_rows({in.r, in.w, in.k, in.v, in.a, in.b}, in.type, tokens.place(ahead), N);
        if (kept_removed) memcpy(kept_removed + tokens.place(first + t) + from, at.removed + from, sizeof(float) * width);
        update<N, width>(at.state.parts_of[part][0], at.r[t], at.decay[t], at.k[t], at.b[t], at.next_a[t], at.v[t] + from,
                         at.removed + from, at.y[t] + from);
      }
    }
    for (int t = 0; t < size; ++t) narrow_row(y, at.y[t], in.type, tokens.place(first + t), N);
  }
  if (final) at.state.get(final + states);
  zero_others(sequences, sequence, head, N, in.type, {y});
  if (kept) {
    zero_others(sequences, sequence, head, N, Float::float32, {kept_removed});
    zero_states(kept, sequences, sequence, head, chunk, N);
  }
}

template <int N>
struct BackwardScratch {
  using Chunk = float[chunk_tokens][N];
  alignas(64) Chunk r, decay, slope, k, v, a, b, removed, dy;
  alignas(64) Chunk dr, dd, dk, dv, da, db;
  alignas(64) float history[chunk_tokens + 1][backward_rows<N>][N];
  alignas(64) float dstate[N][N];
};

// The tokens of one chunk, backwards, for the rows from `value` on. `state` holds those rows before the chunk.
template <int N>
inline void backward_of_rows(BackwardScratch<N>& at, const float* state, int value, int size) {
  constexpr int rows = backward_rows<N>, count = N / int(lanes);
  floats x[rows][count];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) store(at.history[0][i] + j * lanes, x[i][j] = load(state + (value + i) * N + j * lanes));
  }
  for (int t = 0; t < size; ++t) {
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) {
      const floats decay = load(at.decay[t] + j * lanes), k = load(at.k[t] + j * lanes), b = load(at.b[t] + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        floats s = x[i][j];
        s = s * decay + s;
        s += b * at.removed[t][value + i];
        s += k * at.v[t][value + i];
        x[i][j] = s;
        store(at.history[t + 1][i] + j * lanes, s);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) x[i][j] = load(at.dstate[value + i] + j * lanes);
  }
  for (int t = size - 1; t >= 0; --t) {
    floats totals[2 * rows];  // of dv, then of the gradient of S a
#pragma GCC unroll 32
    for (int i = 0; i < 2 * rows; ++i) totals[i] = splat(0);
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) {
      const int64_t from = j * lanes;
      const floats r = load(at.r[t] + from), k = load(at.k[t] + from), b = load(at.b[t] + from);
      floats dr = load(at.dr[t] + from), dd = load(at.dd[t] + from), dk = load(at.dk[t] + from), db = load(at.db[t] + from);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const float dy = at.dy[t][value + i];
        const floats dx = x[i][j] + r * dy;
        x[i][j] = dx;
        dr += load(at.history[t + 1][i] + from) * dy;
        dd += dx * load(at.history[t][i] + from);
        dk += dx * at.v[t][value + i];
        db += dx * at.removed[t][value + i];
        totals[i] += dx * k;
        totals[rows + i] += dx * b;
      }
      store(at.dr[t] + from, dr);
      store(at.dd[t] + from, dd);
      store(at.dk[t] + from, dk);
      store(at.db[t] + from, db);
    }
    float total[lanes];
    store(total, sums<2 * rows>(totals));
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) at.dv[t][value + i] = total[i];
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) {
      const int64_t from = j * lanes;
      const floats decay = load(at.decay[t] + from), a = load(at.a[t] + from);
      floats da = load(at.da[t] + from);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const float dremoved = total[rows + i];
        da += load(at.history[t][i] + from) * dremoved;
        floats dx = x[i][j];
        dx = dx * decay + dx;
        x[i][j] = dx + a * dremoved;
      }
      store(at.da[t] + from, da);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) store(at.dstate[value + i] + j * lanes, x[i][j]);
  }
}

template <int N>
void backward_head(const Wkv7& in, int64_t sequence, int64_t head, const float* kept, const float* removed, const void* dy,
                   const float* dfinal, const Wkv7Gradients& out) {
  using Scratch = BackwardScratch<N>;
  const auto memory = std::make_unique<Scratch>();
  Scratch& at = *memory;
  const Sequences& sequences = in.sequences;
  const HeadTokens<N> tokens(sequences, sequence, head);
  const int64_t count = tokens.count, states = tokens.states;

  copy_or_zero(at.dstate[0], dfinal ? dfinal + states : nullptr, N * N);
  const int64_t chunks = (count + chunk_tokens - 1) / chunk_tokens;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t first = chunk * chunk_tokens;
    const int size = int(std::min<int64_t>(chunk_tokens, count - first));
    for (int t = 0; t < size; ++t) {
      const int64_t offset = tokens.place(first + t);
      widen_row(at.r[t], in.r, in.type, offset, N);
      widen_row(at.decay[t], in.w, in.type, offset, N);
      widen_row(at.k[t], in.k, in.type, offset, N);
      widen_row(at.v[t], in.v, in.type, offset, N);
      widen_row(at.a[t], in.a, in.type, offset, N);
      widen_row(at.b[t], in.b, in.type, offset, N);
      widen_row(at.dy[t], dy, in.type, offset, N);
      memcpy(at.removed[t], removed + offset, sizeof at.removed[t]);
      replace_by_decays<Decay>(at.decay[t], at.slope[t], N);
    }
    for (auto* sums_over_values : {&at.dr, &at.dd, &at.dk, &at.da, &at.db}) memset(*sums_over_values, 0, sizeof at.dr);
    const float* state = kept + ((sequences.first_chunk(sequence) + chunk) * sequences.heads + head) * N * N;
    for (int value = 0; value < N; value += backward_rows<N>) backward_of_rows<N>(at, state, value, size);
    for (int t = 0; t < size; ++t) {
      const int64_t offset = tokens.place(first + t);
      each_vector(N, [&](int64_t i) { store(at.dd[t] + i, load(at.dd[t] + i) * load(at.slope[t] + i)); });
      narrow_row(out.r, at.dr[t], in.type, offset, N);
      narrow_row(out.w, at.dd[t], in.type, offset, N);
      narrow_row(out.k, at.dk[t], in.type, offset, N);
      narrow_row(out.v, at.dv[t], in.type, offset, N);
      narrow_row(out.a, at.da[t], in.type, offset, N);
      narrow_row(out.b, at.db[t], in.type, offset, N);
    }
  }
  if (out.initial) memcpy(out.initial + states, at.dstate, sizeof at.dstate);
  zero_others(sequences, sequence, head, N, in.type, {out.r, out.w, out.k, out.v, out.a, out.b});
}

// One token: rows of the state come and go once, and both products with them are sums over lanes.
template <int N>
void step_head(const Wkv7& in, int64_t sequence, int64_t head, float* states, void* y) {
  constexpr int rows = backward_rows<N>, count = N / int(lanes);
  alignas(64) float r[N], decay[N], k[N], v[N], a[N], b[N], result[N];
  const int64_t offset = (sequence * in.sequences.heads + head) * N;
  widen_row(r, in.r, in.type, offset, N);
  widen_row(decay, in.w, in.type, offset, N);
  widen_row(k, in.k, in.type, offset, N);
  widen_row(v, in.v, in.type, offset, N);
  widen_row(a, in.a, in.type, offset, N);
  widen_row(b, in.b, in.type, offset, N);
  replace_by_decays<Decay>(decay, nullptr, N);
  for (int value = 0; value < N; value += rows) {
    float* state = states + (offset + value) * N;
    floats x[rows][count], totals[rows];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      totals[i] = splat(0);
#pragma GCC unroll 32
      for (int j = 0; j < count; ++j) totals[i] += (x[i][j] = load(state + i * N + j * lanes)) * load(a + j * lanes);
    }
    float total[lanes];
    store(total, sums<rows>(totals));
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      totals[i] = splat(0);
#pragma GCC unroll 32
      for (int j = 0; j < count; ++j) {
        floats s = x[i][j];
        s = s * load(decay + j * lanes) + s;
        s += load(b + j * lanes) * total[i];
        s += load(k + j * lanes) * v[value + i];
        totals[i] += s * load(r + j * lanes);
        store(state + i * N + j * lanes, s);
      }
    }
    store(total, sums<rows>(totals));
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) result[value + i] = total[i];
  }
  narrow_row(y, result, in.type, offset, N);
}
