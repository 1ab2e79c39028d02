// The recurrence by chunks of 16 tokens, on tensor cores; NOTES.md has the algebra and its names. One block for each head of each
// sequence, one warp for every 16 values (rows of the state). N head size.
#include <cmath>

#include "../../include/cuda_chunks.h"
#include "op.h"

namespace kernels {
namespace {

// Blocks of a processor that registers are to suffice for: what nvcc manages without spilling.
template <int N>
constexpr int resident = N == 64 ? 3 : 1;

// The logarithm of the decay. Below -200 all decays are 0, and sums of 16 stay finite; a NaN stays one.
__device__ __forceinline__ float log_decay_of(float logit) { return logit > 5.298f ? -200.0f : -expf(logit); }

// What a thread reads of a chunk. Tokens that do not count are zeros without decay.
struct Inputs {
  bool counts;
  Eight r, k, v, w;
};
template <int N>
__device__ __forceinline__ Inputs inputs_of(const Wkv6& in, const Head<N>& at, int64_t first) {
  const Share<N> share;
  const int64_t token = first + share.token;
  Inputs own;
  own.counts = token < at.end && in.sequences.counts(token);
  own.r = share.get(in.r, at, first, own.counts);
  own.k = share.get(in.k, at, first, own.counts);
  own.v = share.get(in.v, at, first, own.counts);
  own.w = share.get(in.w, at, first, own.counts);
  return own;
}

// u of the thread's columns.
template <int N>
__device__ __forceinline__ Eight bonus_of(const Wkv6& in, const Head<N>& at) {
  Eight u;
  u.pack = *reinterpret_cast<const Pack<bfloat16>*>(static_cast<const bfloat16*>(in.u) + at.head * N + Share<N>().column);
  return u;
}

// A chunk in shared memory: vectors are tiles [16][stride<N>].
struct Chunk {
  bfloat16 *r, *k, *v;       // r times the decays before its token, k times those behind it, v
  bfloat16 *plain_r;         // as it came
  bfloat16* scores;          // [16 readers][16 writers][square]: r k times the decays between, r u k on the diagonal, 0 above it
  float *logs, *decays;      // [16][N]
  float* change;             // [N]: the decays of all tokens - 1
};

// Every thread waits twice for the others: what it read of the last chunk may then be overwritten (logs, decays and plain_r already
// before), and what it reads next is there but for `after()`, which runs before the second wait.
template <int N, class After>
__device__ __forceinline__ void scale_vectors(const Chunk& to, const Inputs& own, const Eight& u, bool scores, After after) {
  const Share<N> share;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float log = own.counts ? log_decay_of(own.w[i]) : 0.0f;
    to.logs[share.token * N + share.column + i] = log;
    to.decays[share.token * N + share.column + i] = expf(log);
  }
  share.put(to.plain_r, own.r);
  __syncthreads();
  if (threadIdx.x < N) {
    float sum = 0;
#pragma unroll
    for (int token = 0; token < chunk; ++token) sum += to.logs[token * N + threadIdx.x];
    // less one, so that slow decays keep their digits over many chunks
    to.change[threadIdx.x] = expm1f(sum);
  }
  float before[8], written[8];  // decays before this token; k times the decays between it and the reader
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    before[i] = 1;
    written[i] = own.k[i];
  }
#pragma unroll 4
  for (int token = 0; token < chunk; ++token) {
    const bool later = token > share.token, earlier = token < share.token;
    Eight r;
    if (scores) r.pack = *reinterpret_cast<const Pack<bfloat16>*>(to.plain_r + token * stride<N> + share.column);
    float score = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float decay = to.decays[token * N + share.column + i];
      if (scores) score += r[i] * (earlier ? 0.0f : later ? written[i] : u[i] * own.k[i]);
      before[i] *= earlier ? decay : 1.0f;
      written[i] *= later ? decay : 1.0f;
    }
    if (scores) {
#pragma unroll
      for (int distance = N / 16; distance > 0; distance /= 2) score += __shfl_xor_sync(whole_warp, score, distance);
      if (share.column == 0) to.scores[token * square + share.token] = narrow<bfloat16>(score);
    }
  }
  Eight r, k;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    r.pack.values[i] = narrow<bfloat16>(own.r[i] * before[i]);
    k.pack.values[i] = narrow<bfloat16>(written[i]);
  }
  share.put(to.r, r);
  share.put(to.k, k);
  share.put(to.v, own.v);
  after();
  __syncthreads();
}

template <int N>
__global__ void __launch_bounds__(num_threads<N>, resident<N>) forward_kernel(Wkv6 in, const float* initial, void* y, float* final, float* kept) {
  constexpr int tile = chunk * stride<N>;
  SHARED(Pack<bfloat16>, r, tile / 8);
  SHARED(Pack<bfloat16>, k, tile / 8);
  SHARED(Pack<bfloat16>, v, tile / 8);
  SHARED(Pack<bfloat16>, plain_r, tile / 8);
  SHARED(Pack<bfloat16>, scores, chunk * square / 8);
  SHARED(Pack<bfloat16>, stages, num_warps<N> * chunk * square / 8);
  SHARED(Pack<float>, logs, chunk * N / 4);
  SHARED(Pack<float>, decays, chunk * N / 4);
  SHARED(float, change, N);
  const Chunk of = {r->values, k->values, v->values, plain_r->values, scores->values, logs->values, decays->values, change};
  bfloat16* stage = stages->values + warp_of() * chunk * square;
  const Head<N> at(in.sequences);
  const Eight u = bonus_of(in, at);

  Rows<N> state;
  state.get(initial, at, at.sequence);
  int64_t segment = in.sequences.first_chunk(at.sequence, segment_tokens);
  Inputs next = inputs_of(in, at, at.begin);
  for (int64_t first = at.begin; first < at.end; first += chunk) {
    if (kept && (first - at.begin) % segment_tokens == 0) state.put(kept, at, segment++);
    const Inputs own = next;
    scale_vectors<N>(of, own, u, true, [&] { next = inputs_of(in, at, first + chunk); });
    const Left values = left_of_transposed(of.v + warp_of() * 16, stride<N>);
    Sum out;
#pragma unroll
    for (int part = 0; part < N / 16; ++part)
      add_product(out, left_from(state.sums[part]), right_of_transposed(of.r + part * 16, stride<N>));
    add_product(out, values, right_of_transposed(of.scores, square));
    put_values(y, at, first, out, stage);
    state.multiply_by_more(change);
    state.add_tokens(values, of.k);
  }
  if (final) state.put(final, at, at.sequence);
  if (kept) put_rest(kept, in.sequences, at, segment);
}

// Places in the dynamic shared memory of backward_kernel, in bytes.
template <int N>
struct Memory {
  static constexpr int tile = 2 * chunk * stride<N>, matrix = 2 * N * stride<N>, pairs = 2 * chunk * square;
  static constexpr int r = 0, k = r + tile, v = k + tile, dy = v + tile, plain_r = dy + tile, plain_k = plain_r + tile;
  static constexpr int state = plain_k + tile, gradient = state + matrix;
  static constexpr int scores = gradient + matrix, stages = scores + pairs, dscores = stages + num_warps<N> * pairs;
  static constexpr int logs = dscores + 4 * chunk * chunk, decays = logs + 4 * chunk * N;
  static constexpr int dr = decays + 4 * chunk * N, dk = dr + 4 * chunk * stride<N>;
  static constexpr int change = dk + 4 * chunk * stride<N>, base = change + 4 * N, bytes = base + 4 * N;
};
static_assert(Memory<32>::bytes == 25600 && Memory<64>::bytes == 55040 && Memory<128>::bytes == 138496, "as in binding.py");

// Gradients of one column of a chunk, shared by two neighbouring lanes: those of tokens 2 i + half, where `half` is 0 or 1.
struct OfColumn {
  float r[8], k[8], log[8];
};
// What they are made of, in shared memory. Tiles [16][stride<N>], but decays and logs [16][N], dscores [16][16], base [N].
struct Terms {
  const bfloat16 *r, *k;                     // as they came
  const float *dscores, *decays, *dr, *dk;   // dr, dk: by the states before and after the chunk, and yet to be multiplied by decays
  const float* base;                         // the state before the chunk times the gradient of that after it, summed over values
};

// Sums of both lanes for the tokens of this one.
__device__ __forceinline__ void add_up(const float (&parts)[chunk], int half, float (&sums)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float kept = half ? parts[2 * i + 1] : parts[2 * i], sent = half ? parts[2 * i] : parts[2 * i + 1];
    sums[i] = kept + __shfl_xor_sync(whole_warp, sent, 1);
  }
}

// Every term of a decay's gradient crosses its token, so that none has to cancel another.
template <int N>
__device__ __forceinline__ OfColumn gradients_of_column(const Terms& of, int column, int half) {
  OfColumn own;
  float r[chunk], decay[chunk], terms[chunk];
#pragma unroll
  for (int token = 0; token < chunk; ++token) {
    r[token] = widen(of.r[token * stride<N> + column]);
    decay[token] = of.decays[token * N + column];
  }
  {
    float dr[chunk] = {}, dlog[chunk] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int writer = 2 * i + half;
      const float k = widen(of.k[writer * stride<N> + column]);
      float between = 1, dk = 0, crossing = 0;
#pragma unroll
      for (int reader = 2 * i + 1; reader < chunk; ++reader) {
        const bool later = reader > writer;
        const float weight = later ? of.dscores[reader * chunk + writer] * between : 0.0f;
        dr[reader] += weight * k;
        terms[reader] = weight * r[reader];
        dk += terms[reader];
        between *= later ? decay[reader] : 1.0f;
      }
      own.k[i] = dk;
#pragma unroll
      for (int token = chunk - 2; token > 2 * i; --token) {
        crossing += terms[token + 1];
        dlog[token] += token > writer ? k * crossing : 0.0f;
      }
    }
    add_up(dr, half, own.r);
    add_up(dlog, half, own.log);
  }
  float product = 1;
#pragma unroll
  for (int token = 0; token < chunk; ++token) {
    terms[token] = of.dr[token * stride<N> + column] * product;
    product *= decay[token];
  }
  float crossing = of.base[column] * product;
#pragma unroll
  for (int token = chunk - 1; token >= 0; --token) {
    own.r[token / 2] += token % 2 == half ? terms[token] : 0.0f;
    own.log[token / 2] += token % 2 == half ? crossing : 0.0f;
    crossing += r[token] * terms[token];
  }
  product = 1;
#pragma unroll
  for (int token = chunk - 1; token >= 0; --token) {
    terms[token] = of.dk[token * stride<N> + column] * product;
    product *= decay[token];
  }
  crossing = 0;
#pragma unroll
  for (int token = 0; token < chunk; ++token) {
    own.k[token / 2] += token % 2 == half ? terms[token] : 0.0f;
    own.log[token / 2] += token % 2 == half ? crossing : 0.0f;
    crossing += widen(of.k[token * stride<N> + column]) * terms[token];
  }
  return own;
}

// Segments from the last to the first: the states before the chunks of one are computed again from the one that was kept, then its
// chunks are gone through backwards.
template <int N>
__global__ void __launch_bounds__(num_threads<N>, resident<N>)
    backward_kernel(Wkv6 in, const float* kept, const void* dy_tokens, const float* dfinal, void* history_of_blocks, Wkv6Gradients out) {
  using M = Memory<N>;
  constexpr int tile = chunk * stride<N>, parts = N / 16;
  DYNAMIC_PART(bfloat16, r, tile, M::r);
  DYNAMIC_PART(bfloat16, k, tile, M::k);
  DYNAMIC_PART(bfloat16, v, tile, M::v);
  DYNAMIC_PART(bfloat16, dy, tile, M::dy);
  DYNAMIC_PART(bfloat16, plain_r, tile, M::plain_r);
  DYNAMIC_PART(bfloat16, plain_k, tile, M::plain_k);
  DYNAMIC_PART(bfloat16, state, N * stride<N>, M::state);        // [value][key], before the chunk
  DYNAMIC_PART(bfloat16, gradient, N * stride<N>, M::gradient);  // of the state after it
  DYNAMIC_PART(bfloat16, scores, chunk * square, M::scores);
  DYNAMIC_PART(bfloat16, stages, num_warps<N> * chunk * square, M::stages);
  DYNAMIC_PART(float, dscores, chunk * chunk, M::dscores);
  DYNAMIC_PART(float, logs, chunk * N, M::logs);
  DYNAMIC_PART(float, decays, chunk * N, M::decays);
  DYNAMIC_PART(float, dr, tile, M::dr);
  DYNAMIC_PART(float, dk, tile, M::dk);
  DYNAMIC_PART(float, change, N, M::change);
  DYNAMIC_PART(float, base, N, M::base);
  const Chunk of = {r, k, v, plain_r, scores, logs, decays, change};
  const Terms terms = {plain_r, plain_k, dscores, decays, dr, dk, base};
  const int own_rows = warp_of() * 16;  // values of this warp, or keys where it sums over values
  const int column = own_rows + lane_of() / 2, half = lane_of() % 2;
  bfloat16* stage = stages + warp_of() * chunk * square;
  const Head<N> at(in.sequences);
  const Eight u = bonus_of(in, at);
  const float of_u = widen(static_cast<const bfloat16*>(in.u)[at.head * N + column]);
  const History<N> history(history_of_blocks);

  Rows<N> dstate;
  dstate.get(dfinal, at, at.sequence);
  float du = 0;
  const int64_t segments = (at.end - at.begin + segment_tokens - 1) / segment_tokens;
  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    const int64_t begin = at.begin + segment * segment_tokens;
    const int64_t rest = at.end - begin;
    const int chunks = rest < segment_tokens ? int((rest + chunk - 1) / chunk) : chunks_of_segment;
    {
      Rows<N> from;
      from.get(kept, at, in.sequences.first_chunk(at.sequence, segment_tokens) + segment);
#pragma unroll 1
      for (int i = 0; i < chunks; ++i) {
#pragma unroll
        for (int part = 0; part < parts; ++part) history(i, part) = left_from(from.sums[part]);
        if (i + 1 == chunks) break;
        scale_vectors<N>(of, inputs_of(in, at, begin + i * chunk), u, false, [] {});
        from.multiply_by_more(change);
        from.add_tokens(left_of_transposed(v + own_rows, stride<N>), k);
      }
    }
#pragma unroll 1
    for (int i = chunks - 1; i >= 0; --i) {
      const int64_t first = begin + i * chunk;
      const Share<N> share;
      const Inputs own = inputs_of(in, at, first);
      const Eight own_dy = share.get(dy_tokens, at, first, own.counts);
      share.put(plain_k, own.k);
      scale_vectors<N>(of, own, u, true, [&] {
        share.put(dy, own_dy);
        history.get(i, state);
        dstate.round_to(gradient);
      });

      // by values: the gradient of v, and that of the state before the chunk
      {
        const Left dout = left_of_transposed(dy + own_rows, stride<N>);
        Sum dvalue;
#pragma unroll
        for (int part = 0; part < parts; ++part)
          add_product(dvalue, left_of(gradient + own_rows * stride<N> + part * 16, stride<N>), right_of_transposed(k + part * 16, stride<N>));
        add_product(dvalue, dout, right_of(scores, square));
        put_values(out.v, at, first, dvalue, stage);
        dstate.multiply_by_more(change);
        dstate.add_tokens(dout, r);
      }

      // by keys: what is read from the state before the chunk or written to that after it, then the pairs of tokens
      Sum of_state, to_state;
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        add_product(of_state, left_of(dy + part * 16, stride<N>), right_of(state + part * 16 * stride<N> + own_rows, stride<N>));
        add_product(to_state, left_of(v + part * 16, stride<N>), right_of(gradient + part * 16 * stride<N> + own_rows, stride<N>));
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int place = Sum::row(j) * stride<N> + own_rows + Sum::column(j);
        dr[place] = of_state.values[j];
        dk[place] = to_state.values[j];
      }
      sum_products<N>(state, gradient, base);
      if (warp_of() == 0) {
        Sum sum;
#pragma unroll
        for (int part = 0; part < parts; ++part)
          add_product(sum, left_of(dy + part * 16, stride<N>), right_of_transposed(v + part * 16, stride<N>));
#pragma unroll
        for (int j = 0; j < 8; ++j) dscores[Sum::row(j) * chunk + Sum::column(j)] = sum.values[j];
      }
      __syncthreads();

      OfColumn found = gradients_of_column<N>(terms, column, half);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int token = 2 * j + half, place = token * stride<N> + column;
        const float of_r = widen(plain_r[place]), of_k = widen(plain_k[place]), bonus = dscores[token * chunk + token];
        found.r[j] += of_u * of_k * bonus;
        found.k[j] += of_u * of_r * bonus;
        found.log[j] *= logs[token * N + column];
        du += of_k * of_r * bonus;
      }
      const auto put_column = [&](void* tensor, const float(&of_tokens)[8]) {
#pragma unroll
        for (int j = 0; j < 8; ++j) stage[(2 * j + half) * square + lane_of() / 2] = narrow<bfloat16>(of_tokens[j]);
        put_tokens(tensor, at, first, stage);
      };
      put_column(out.r, found.r);
      put_column(out.k, found.k);
      put_column(out.w, found.log);
      __syncthreads();
    }
  }
  du += __shfl_xor_sync(whole_warp, du, 1);
  if (half == 0) out.u[(at.sequence * at.heads + at.head) * N + column] = du;
  if (out.initial) dstate.put(out.initial, at, at.sequence);
}

}  // namespace

void wkv6_chunked_forward(const Wkv6& in, const float* initial, void* y, float* final, float* kept, void* stream) {
  with_size(in, [&](auto size) {
    constexpr int N = decltype(size)::value;
    const auto kernel = forward_kernel<N>;
    LAUNCH(kernel, blocks(in), dim3(num_threads<N>), 0, stream)(in, initial, y, final, kept);
  });
}

void wkv6_chunked_backward(const Wkv6& in, const float* kept, const void* dy, const float* dfinal, void* history,
                           const Wkv6Gradients& out, void* stream) {
  with_size(in, [&](auto size) {
    constexpr int N = decltype(size)::value;
    const auto kernel = backward_kernel<N>;
    LAUNCH(kernel, blocks(in), dim3(num_threads<N>), Memory<N>::bytes, stream)
    (in, kept, dy, dfinal, history, out);
  });
}

}  // namespace kernels
