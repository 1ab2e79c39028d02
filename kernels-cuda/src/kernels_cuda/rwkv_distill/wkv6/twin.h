// The CPU twin of op.cu, compiled once per instruction set (cpu_levels.h). Tokens go through one head of one sequence one by one.
// N head size; key numbers the columns of a state, value its rows.
#include "../../include/cpu_recurrence.h"

// The decay less one (so that a slow decay keeps its digits) and its derivative with respect to the logit.
struct Decay {
  floats less_one, slope;

  explicit Decay(floats logit) {
    // e^88 is finite, and its decay is 0 already
    const floats logarithm = -exponential(logit > 88.0f ? splat(88.0f) : logit);
    const floats decay = exponential(logarithm);
    less_one = logarithm > -0.6f ? exponential_minus_one(logarithm) : decay - 1.0f;
    slope = logarithm * decay;
  }
};

// The bonus of a token: the sum of u k r.
template <int N>
inline float bonus_of(const float* u, const float* k, const float* r) {
  floats total = splat(0);
  each_vector(N, [&](int64_t i) { total += load(u + i) * load(k + i) * load(r + i); });
  return float(sum(total));
}

// One token for `width` values. The state is [key][width].
template <int N, int width>
inline void update(float* state, const float* r, const float* decay, const float* k, const float* v, float bonus, float* y) {
  constexpr int count = width / lanes;
  floats values[count], sums_y[count];
#pragma GCC unroll 16
  for (int j = 0; j < count; ++j) {
    values[j] = load(v + j * lanes);
    sums_y[j] = values[j] * bonus;
  }
  for (int key = 0; key < N; ++key) {
    const floats rk = splat(r[key]), dk = splat(decay[key]), kk = splat(k[key]);
#pragma GCC unroll 16
    for (int j = 0; j < count; ++j) {
      float* place = state + key * width + j * lanes;
      const floats before = load(place);
      sums_y[j] += before * rk;
      floats s = before * dk + before;
      s += values[j] * kk;
      store(place, s);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < count; ++j) store(y + j * lanes, sums_y[j]);
}

template <int N>
struct ForwardScratch {
  StateByKeys<N> state;
  alignas(64) float r[chunk_tokens][N], decay[chunk_tokens][N], k[chunk_tokens][N], v[chunk_tokens][N], y[chunk_tokens][N];
  alignas(64) float u[N];
  float bonus[chunk_tokens];
};

template <int N>
void forward_head(const Wkv6& in, int64_t sequence, int64_t head, const float* initial, void* y, float* final, float* kept) {
  using Scratch = ForwardScratch<N>;
  constexpr int width = StateByKeys<N>::width;
  const auto memory = std::make_unique<Scratch>();
  Scratch& at = *memory;
  const Sequences& sequences = in.sequences;
  const HeadTokens<N> tokens(sequences, sequence, head);
  const int64_t count = tokens.count, states = tokens.states;

  widen_row(at.u, in.u, in.type, head * N, N);
  if (initial)
    at.state.set(initial + states);
  else
    memset(at.state.parts_of, 0, sizeof at.state.parts_of);
  int64_t chunk = sequences.first_chunk(sequence);
  for (int64_t first = 0; first < count; first += chunk_tokens, ++chunk) {
    const int size = int(std::min<int64_t>(chunk_tokens, count - first));
    if (kept) at.state.get(kept + (chunk * sequences.heads + head) * N * N);
    for (int t = 0; t < size; ++t) {
      const int64_t offset = tokens.place(first + t);
      widen_row(at.r[t], in.r, in.type, offset, N);
      widen_row(at.k[t], in.k, in.type, offset, N);
      widen_row(at.v[t], in.v, in.type, offset, N);
      widen_row(at.decay[t], in.w, in.type, offset, N);
      replace_by_decays<Decay>(at.decay[t], nullptr, N);
      at.bonus[t] = bonus_of<N>(at.u, at.k[t], at.r[t]);
    }
    for (int part = 0; part < N / width; ++part) {
      const int from = part * width;
      for (int t = 0; t < size; ++t) {
        const int64_t ahead = first + chunk_tokens + t;
        if (part == 0 && ahead < count) fetch_rows({in.r, in.k, in.v, in.w}, in.type, tokens.place(ahead), N);
        update<N, width>(at.state.parts_of[part][0], at.r[t], at.decay[t], at.k[t], at.v[t] + from, at.bonus[t], at.y[t] + from);
      }
    }
    for (int t = 0; t < size; ++t) narrow_row(y, at.y[t], in.type, tokens.place(first + t), N);
  }
  if (final) at.state.get(final + states);
  zero_others(sequences, sequence, head, N, in.type, {y});
  if (kept) zero_states(kept, sequences, sequence, head, chunk, N);
}

template <int N>
struct BackwardScratch {
  using Chunk = float[chunk_tokens][N];
  alignas(64) Chunk r, decay, slope, k, v, dy;
  alignas(64) Chunk dr, dd, dk, dv;
  alignas(64) float history[chunk_tokens][backward_rows<N>][N];
  alignas(64) float dstate[N][N];
  alignas(64) float u[N], du[N];
};

// The tokens of one chunk, backwards, for the rows from `value` on. `state` holds those rows before the chunk.
template <int N>
inline void backward_of_rows(BackwardScratch<N>& at, const float* state, int value, int size) {
  constexpr int rows = backward_rows<N>, count = N / int(lanes);
  floats x[rows][count];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) x[i][j] = load(state + (value + i) * N + j * lanes);
  }
  for (int t = 0; t < size; ++t) {
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) {
      const floats decay = load(at.decay[t] + j * lanes), k = load(at.k[t] + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        floats s = x[i][j];
        store(at.history[t][i] + j * lanes, s);
        s = s * decay + s;
        x[i][j] = s + k * at.v[t][value + i];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) x[i][j] = load(at.dstate[value + i] + j * lanes);
  }
  for (int t = size - 1; t >= 0; --t) {
    floats totals[rows];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) totals[i] = splat(0);
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) {
      const int64_t from = j * lanes;
      const floats r = load(at.r[t] + from), k = load(at.k[t] + from), decay = load(at.decay[t] + from);
      floats dr = load(at.dr[t] + from), dd = load(at.dd[t] + from), dk = load(at.dk[t] + from);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const float dy = at.dy[t][value + i];
        const floats dx = x[i][j], before = load(at.history[t][i] + from);
        dr += before * dy;
        dd += dx * before;
        dk += dx * at.v[t][value + i];
        totals[i] += dx * k;
        x[i][j] = dx * decay + dx + r * dy;
      }
      store(at.dr[t] + from, dr);
      store(at.dd[t] + from, dd);
      store(at.dk[t] + from, dk);
    }
    float total[lanes];
    store(total, sums<rows>(totals));
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) at.dv[t][value + i] = total[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) store(at.dstate[value + i] + j * lanes, x[i][j]);
  }
}

template <int N>
void backward_head(const Wkv6& in, int64_t sequence, int64_t head, const float* kept, const void* dy, const float* dfinal,
                   const Wkv6Gradients& out) {
  using Scratch = BackwardScratch<N>;
  const auto memory = std::make_unique<Scratch>();
  Scratch& at = *memory;
  const Sequences& sequences = in.sequences;
  const HeadTokens<N> tokens(sequences, sequence, head);
  const int64_t count = tokens.count, states = tokens.states;

  widen_row(at.u, in.u, in.type, head * N, N);
  memset(at.du, 0, sizeof at.du);
  copy_or_zero(at.dstate[0], dfinal ? dfinal + states : nullptr, N * N);
  const int64_t chunks = (count + chunk_tokens - 1) / chunk_tokens;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t first = chunk * chunk_tokens;
    const int size = int(std::min<int64_t>(chunk_tokens, count - first));
    for (int t = 0; t < size; ++t) {
      const int64_t offset = tokens.place(first + t);
      widen_row(at.r[t], in.r, in.type, offset, N);
      widen_row(at.k[t], in.k, in.type, offset, N);
      widen_row(at.v[t], in.v, in.type, offset, N);
      widen_row(at.decay[t], in.w, in.type, offset, N);
      widen_row(at.dy[t], dy, in.type, offset, N);
      replace_by_decays<Decay>(at.decay[t], at.slope[t], N);
    }
    for (auto* sums_over_values : {&at.dr, &at.dd, &at.dk}) memset(*sums_over_values, 0, sizeof at.dr);
    const float* state = kept + ((sequences.first_chunk(sequence) + chunk) * sequences.heads + head) * N * N;
    for (int value = 0; value < N; value += backward_rows<N>) {
      // the chunk before, a part with every few rows
      for (int64_t ahead = value * chunk_tokens / N; chunk > 0 && ahead < (value + backward_rows<N>) * chunk_tokens / N; ++ahead)
        fetch_rows({in.r, in.k, in.v, in.w, dy}, in.type, tokens.place(first - chunk_tokens + ahead), N);
      backward_of_rows<N>(at, state, value, size);
    }
    for (int t = size - 1; t >= 0; --t) {
      const int64_t offset = tokens.place(first + t);
      floats total = splat(0);
      each_vector(N, [&](int64_t i) { total += load(at.v[t] + i) * load(at.dy[t] + i); });
      const float dbonus = float(sum(total)), bonus = bonus_of<N>(at.u, at.k[t], at.r[t]);
      each_vector(N, [&](int64_t i) {
        const floats u = load(at.u + i), k = load(at.k[t] + i), r = load(at.r[t] + i);
        store(at.dr[t] + i, load(at.dr[t] + i) + u * k * dbonus);
        store(at.dk[t] + i, load(at.dk[t] + i) + u * r * dbonus);
        store(at.du + i, load(at.du + i) + k * r * dbonus);
        store(at.dv[t] + i, load(at.dv[t] + i) + load(at.dy[t] + i) * bonus);
        store(at.dd[t] + i, load(at.dd[t] + i) * load(at.slope[t] + i));
      });
      narrow_row(out.r, at.dr[t], in.type, offset, N);
      narrow_row(out.k, at.dk[t], in.type, offset, N);
      narrow_row(out.v, at.dv[t], in.type, offset, N);
      narrow_row(out.w, at.dd[t], in.type, offset, N);
    }
  }
  memcpy(out.u + (sequence * sequences.heads + head) * N, at.du, sizeof at.du);
  if (out.initial) memcpy(out.initial + states, at.dstate, sizeof at.dstate);
  zero_others(sequences, sequence, head, N, in.type, {out.r, out.k, out.v, out.w});
}

// One token: rows of the state come and go once, and y is a sum over lanes.
template <int N>
void step_head(const Wkv6& in, int64_t sequence, int64_t head, float* states, void* y) {
  constexpr int rows = backward_rows<N>, count = N / int(lanes);
  alignas(64) float r[N], k[N], v[N], decay[N], u[N], result[N];
  const int64_t offset = (sequence * in.sequences.heads + head) * N;
  widen_row(r, in.r, in.type, offset, N);
  widen_row(k, in.k, in.type, offset, N);
  widen_row(v, in.v, in.type, offset, N);
  widen_row(decay, in.w, in.type, offset, N);
  widen_row(u, in.u, in.type, head * N, N);
  replace_by_decays<Decay>(decay, nullptr, N);
  const float bonus = bonus_of<N>(u, k, r);
  for (int value = 0; value < N; value += rows) {
    float* state = states + (offset + value) * N;
    floats totals[rows];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      totals[i] = splat(0);
#pragma GCC unroll 32
      for (int j = 0; j < count; ++j) {
        floats s = load(state + i * N + j * lanes);
        totals[i] += s * load(r + j * lanes);
        s = s * load(decay + j * lanes) + s;
        s += load(k + j * lanes) * v[value + i];
        store(state + i * N + j * lanes, s);
      }
    }
    float total[lanes];
    store(total, sums<rows>(totals));
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) result[value + i] = total[i] + v[value + i] * bonus;
  }
  narrow_row(y, result, in.type, offset, N);
}
