// The recurrence by chunks of 16 tokens, on tensor cores; NOTES.md has the algebra and its names. One block for each head of each
// sequence, one warp for every 16 values (rows of the state). N head size.
#include <cmath>

#include "../../include/cuda_chunks.h"
#include "op.h"

namespace kernels {
namespace {

constexpr int middle = chunk / 2 - 1;
// Blocks of a processor that registers are to suffice for: what nvcc manages without spilling.
template <int N>
constexpr int resident = N == 64 ? 3 : 1;

// The logarithm of the decay, and its derivative with respect to the logit.
struct LogDecay {
  float value, slope;
};
__device__ __forceinline__ LogDecay log_decay_of(float logit) {
  const float factor = -0.606530659712633424f;  // -exp(-1/2)
  const float small = expf(-fabsf(logit)), large_sigmoid = 1.0f / (1.0f + small), small_sigmoid = small * large_sigmoid;
  return {factor * (logit > 0 ? large_sigmoid : small_sigmoid), factor * large_sigmoid * small_sigmoid};
}

// What a thread reads of a chunk. Tokens that do not count are zeros without decay.
struct Inputs {
  bool counts;
  Eight r, w, k, v, a, b;
};
template <int N>
__device__ __forceinline__ Inputs inputs_of(const Wkv7& in, const Head<N>& at, int64_t first) {
  const Share<N> share;
  const int64_t token = first + share.token;
  Inputs own;
  own.counts = token < at.end && in.sequences.counts(token);
  own.r = share.get(in.r, at, first, own.counts);
  own.w = share.get(in.w, at, first, own.counts);
  own.k = share.get(in.k, at, first, own.counts);
  own.v = share.get(in.v, at, first, own.counts);
  own.a = share.get(in.a, at, first, own.counts);
  own.b = share.get(in.b, at, first, own.counts);
  return own;
}

// A chunk in shared memory: vectors [16][stride<N>] scaled to the middle of the chunk, products of vectors [16][square].
struct Chunk {
  bfloat16 *r, *k, *b, *a, *v;          // r exp(G - m), k exp(m - G), b exp(m - G), a exp(G of the token before - m), v
  bfloat16 *ak, *rk, *rb, *inverse;     // a k^T below the diagonal, r k^T and r b^T with it; 1 / (1 - a b^T)
  float *ab, *logs, *enter, *leave;     // [16][16] below the diagonal; [16][N]; exp(m), exp(G of the last token - m)
  float* scale;                         // [17][N]: exp(G - m) of the token before, for backward; or null
};

// All but the products. Every thread waits twice for the others: what it read of the last chunk may then be overwritten, and what it
// reads next is there but for `after()`, which runs before the second wait.
template <int N, class After>
__device__ __forceinline__ void scale_vectors(const Chunk& to, const Inputs& own, After after) {
  const Share<N> share;
  float log[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    log[i] = own.counts ? log_decay_of(own.w[i]).value : 0.0f;
    to.logs[share.token * N + share.column + i] = log[i];
  }
  __syncthreads();
  float sum[8] = {}, until[8], half[8];  // G of the last, of this and of the middle token
#pragma unroll
  for (int token = 0; token < chunk; ++token) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum[i] += to.logs[token * N + share.column + i];
      if (token == share.token) until[i] = sum[i];
      if (token == middle) half[i] = sum[i];
    }
  }
  Eight r, k, b, a;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float up = expf(until[i] - half[i]), down = expf(half[i] - until[i]), before = expf(until[i] - log[i] - half[i]);
    r.pack.values[i] = narrow<bfloat16>(own.r[i] * up);
    k.pack.values[i] = narrow<bfloat16>(own.k[i] * down);
    b.pack.values[i] = narrow<bfloat16>(own.b[i] * down);
    a.pack.values[i] = narrow<bfloat16>(own.a[i] * before);
    const int column = share.column + i;
    if (to.scale) to.scale[(share.token + 1) * N + column] = up;
    if (share.token == 0) {
      to.enter[column] = expf(half[i]);
      to.leave[column] = expf(sum[i] - half[i]);
      if (to.scale) to.scale[column] = before;
    }
  }
  share.put(to.r, r);
  share.put(to.k, k);
  share.put(to.b, b);
  share.put(to.a, a);
  share.put(to.v, own.v);
  after();
  __syncthreads();
}

// Column c of 1 / (1 - L) with L below the diagonal is x = e_c + L x.
__device__ __forceinline__ void invert(const float* below, bfloat16* inverse) {
  const int column = lane_of() % chunk;
  float x[chunk];
#pragma unroll
  for (int i = 0; i < chunk; ++i) {
    x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < i; ++j) x[i] += below[i * chunk + j] * x[j];
    if (lane_of() < chunk) inverse[i * square + column] = narrow<bfloat16>(x[i]);
  }
}

// The products of vectors, each by one warp; those with r only if `outputs`.
template <int N>
__device__ __forceinline__ void multiply_vectors(const Chunk& at, bool outputs) {
#pragma unroll 1
  for (int which = warp_of(); which < (outputs ? 4 : 2); which += num_warps<N>) {
    const bfloat16 *left = which < 2 ? at.a : at.r, *right = which % 2 ? at.k : at.b;
    Sum sum;
#pragma unroll
    for (int keys = 0; keys < N; keys += 16)
      add_product(sum, left_of(left + keys, stride<N>), right_of_transposed(right + keys, stride<N>));
    sum = lower(sum, which >= 2);
    if (which == 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) at.ab[Sum::row(i) * chunk + Sum::column(i)] = sum.values[i];
      __syncwarp();
      invert(at.ab, at.inverse);
    } else {
      put(which == 1 ? at.ak : which == 2 ? at.rb : at.rk, square, sum);
    }
  }
}

// (S a)^T of the chunk's tokens for the warp's values, from what the state at its start gives.
__device__ __forceinline__ Left removed_from(Sum sum, const Chunk& at, const Left& v) {
  add_product(sum, v, right_of_transposed(at.ak, square));
  Sum removed;
  add_product(removed, left_from(sum), right_of_transposed(at.inverse, square));
  return left_from(removed);
}

template <int N>
__global__ void __launch_bounds__(num_threads<N>, resident<N>) forward_kernel(Wkv7 in, const float* initial, void* y, float* final, float* kept) {
  constexpr int tile = chunk * stride<N>;
  SHARED(Pack<bfloat16>, r, tile / 8);
  SHARED(Pack<bfloat16>, k, tile / 8);
  SHARED(Pack<bfloat16>, b, tile / 8);
  SHARED(Pack<bfloat16>, a, tile / 8);
  SHARED(Pack<bfloat16>, v, tile / 8);
  SHARED(Pack<bfloat16>, ak, chunk * square / 8);
  SHARED(Pack<bfloat16>, rk, chunk * square / 8);
  SHARED(Pack<bfloat16>, rb, chunk * square / 8);
  SHARED(Pack<bfloat16>, inverse, chunk * square / 8);
  SHARED(Pack<bfloat16>, stages, num_warps<N> * chunk * square / 8);
  SHARED(float, ab, chunk * chunk);
  SHARED(Pack<float>, logs, chunk * N / 4);
  SHARED(float, enter, N);
  SHARED(float, leave, N);
  const Chunk of = {r->values,  k->values,  b->values,       a->values, v->values,    ak->values, rk->values,
                    rb->values, inverse->values, ab,        logs->values, enter,      leave,      nullptr};
  bfloat16* stage = stages->values + warp_of() * chunk * square;
  const Head<N> at(in.sequences);

  Rows<N> state;
  state.get(initial, at, at.sequence);
  int64_t segment = in.sequences.first_chunk(at.sequence, segment_tokens);
  Inputs next = inputs_of(in, at, at.begin);
  for (int64_t first = at.begin; first < at.end; first += chunk) {
    if (kept && (first - at.begin) % segment_tokens == 0) state.put(kept, at, segment++);
    const Inputs own = next;
    scale_vectors<N>(of, own, [&] { next = inputs_of(in, at, first + chunk); });
    state.multiply(enter);
    Sum removed, out;
#pragma unroll
    for (int part = 0; part < N / 16; ++part) {
      const Left rows = left_from(state.sums[part]);
      add_product(removed, rows, right_of_transposed(of.a + part * 16, stride<N>));
      add_product(out, rows, right_of_transposed(of.r + part * 16, stride<N>));
    }
    multiply_vectors<N>(of, true);
    __syncthreads();
    const Left values = left_of_transposed(of.v + warp_of() * 16, stride<N>), gone = removed_from(removed, of, values);
    add_product(out, values, right_of_transposed(of.rk, square));
    add_product(out, gone, right_of_transposed(of.rb, square));
    put_values(y, at, first, out, stage);
    state.add_tokens(values, of.k);
    state.add_tokens(gone, of.b);
    state.multiply(leave);
  }
  if (final) state.put(final, at, at.sequence);
  if (kept) put_rest(kept, in.sequences, at, segment);
}

// Places in the dynamic shared memory of backward_kernel, in bytes.
template <int N>
struct Memory {
  static constexpr int tile = 2 * chunk * stride<N>, matrix = 2 * N * stride<N>, values = 2 * N * square, pairs = 2 * chunk * square;
  static constexpr int r = 0, k = r + tile, b = k + tile, a = b + tile, v = a + tile, dy = v + tile;
  static constexpr int state = dy + tile, gradient = state + matrix;
  static constexpr int removed = gradient + matrix, dmoved = removed + values;
  static constexpr int ak = dmoved + values, rk = ak + pairs, rb = rk + pairs, inverse = rb + pairs;
  static constexpr int dak = inverse + pairs, drk = dak + pairs, drb = drk + pairs, dab = drb + pairs;
  static constexpr int stages = dab + pairs, ab = stages + num_warps<N> * pairs;
  static constexpr int logs = ab + 4 * chunk * chunk, terms = logs + 4 * chunk * N, scale = terms + 4 * chunk * N;
  static constexpr int enter = scale + 4 * (chunk + 1) * N, leave = enter + 4 * N, base = leave + 4 * N, bytes = base + 4 * N;
};
static_assert(Memory<32>::bytes == 31232 && Memory<64>::bytes == 61952 && Memory<128>::bytes == 147968, "as in binding.py");

// Segments from the last to the first: the states before the chunks of one are computed again from the one that was kept, then its
// chunks are gone through backwards. `history` holds the states as left factors, each thread's own.
template <int N>
__global__ void __launch_bounds__(num_threads<N>, resident<N>)
    backward_kernel(Wkv7 in, const float* kept, const void* dy_tokens, const float* dfinal, void* history_of_blocks, Wkv7Gradients out) {
  using M = Memory<N>;
  constexpr int tile = chunk * stride<N>, parts = N / 16;
  DYNAMIC_PART(bfloat16, r, tile, M::r);
  DYNAMIC_PART(bfloat16, k, tile, M::k);
  DYNAMIC_PART(bfloat16, b, tile, M::b);
  DYNAMIC_PART(bfloat16, a, tile, M::a);
  DYNAMIC_PART(bfloat16, v, tile, M::v);
  DYNAMIC_PART(bfloat16, dy, tile, M::dy);
  DYNAMIC_PART(bfloat16, state, N * stride<N>, M::state);        // [value][key], scaled like the chunk
  DYNAMIC_PART(bfloat16, gradient, N * stride<N>, M::gradient);  // of the state after the chunk, likewise
  DYNAMIC_PART(bfloat16, removed, N * square, M::removed);       // S a, [value][token]
  DYNAMIC_PART(bfloat16, dmoved, N * square, M::dmoved);         // gradient of S a before tokens of the chunk changed it
  DYNAMIC_PART(bfloat16, ak, chunk * square, M::ak);
  DYNAMIC_PART(bfloat16, rk, chunk * square, M::rk);
  DYNAMIC_PART(bfloat16, rb, chunk * square, M::rb);
  DYNAMIC_PART(bfloat16, inverse, chunk * square, M::inverse);
  DYNAMIC_PART(bfloat16, dak, chunk * square, M::dak);
  DYNAMIC_PART(bfloat16, drk, chunk * square, M::drk);
  DYNAMIC_PART(bfloat16, drb, chunk * square, M::drb);
  DYNAMIC_PART(bfloat16, dab, chunk * square, M::dab);
  DYNAMIC_PART(bfloat16, stages, num_warps<N> * chunk * square, M::stages);
  DYNAMIC_PART(float, ab, chunk * chunk, M::ab);
  DYNAMIC_PART(float, logs, chunk * N, M::logs);
  DYNAMIC_PART(float, terms, chunk * N, M::terms);
  DYNAMIC_PART(float, scale, (chunk + 1) * N, M::scale);
  DYNAMIC_PART(float, enter, N, M::enter);
  DYNAMIC_PART(float, leave, N, M::leave);
  DYNAMIC_PART(float, base, N, M::base);
  const Chunk of = {r, k, b, a, v, ak, rk, rb, inverse, ab, logs, enter, leave, scale};
  const int own_rows = warp_of() * 16;  // values of this warp, or keys where it sums over values
  bfloat16* stage = stages + warp_of() * chunk * square;
  const Head<N> at(in.sequences);
  const History<N> history(history_of_blocks);

  Rows<N> dstate;
  dstate.get(dfinal, at, at.sequence);
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
        scale_vectors<N>(of, inputs_of(in, at, begin + i * chunk), [] {});
        from.multiply(enter);
        Sum sum;
#pragma unroll
        for (int part = 0; part < parts; ++part) {
          const Left rows = left_from(from.sums[part]);
          history(i, part) = rows;
          add_product(sum, rows, right_of_transposed(a + part * 16, stride<N>));
        }
        if (i + 1 == chunks) break;
        multiply_vectors<N>(of, false);
        __syncthreads();
        const Left values = left_of_transposed(v + own_rows, stride<N>), gone = removed_from(sum, of, values);
        from.add_tokens(values, k);
        from.add_tokens(gone, b);
        from.multiply(leave);
      }
    }
#pragma unroll 1
    for (int i = chunks - 1; i >= 0; --i) {
      const int64_t first = begin + i * chunk;
      const Share<N> share;
      const Inputs own = inputs_of(in, at, first);
      const Eight own_dy = share.get(dy_tokens, at, first, own.counts);
      scale_vectors<N>(of, own, [&] {
        share.put(dy, own_dy);
        history.get(i, state);
      });
      dstate.multiply(leave);
      dstate.round_to(gradient);
      multiply_vectors<N>(of, true);
      __syncthreads();

      // by values: S a, its gradient, the gradient of v, and that of the state before the chunk
      {
        const Left values = left_of_transposed(v + own_rows, stride<N>), dout = left_of_transposed(dy + own_rows, stride<N>);
        Sum sum, dremoved, dvalue;
#pragma unroll
        for (int part = 0; part < parts; ++part) {
          const Left after = left_of(gradient + own_rows * stride<N> + part * 16, stride<N>);
          add_product(sum, left_of(state + own_rows * stride<N> + part * 16, stride<N>), right_of_transposed(a + part * 16, stride<N>));
          add_product(dremoved, after, right_of_transposed(b + part * 16, stride<N>));
          add_product(dvalue, after, right_of_transposed(k + part * 16, stride<N>));
        }
        const Left gone = removed_from(sum, of, values);
        add_product(dremoved, dout, right_of(rb, square));
        Sum before;
        add_product(before, left_from(dremoved), right_of(inverse, square));
        const Left dgone = left_from(before);
        add_product(dvalue, dout, right_of(rk, square));
        add_product(dvalue, dgone, right_of(ak, square));
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const int place = (own_rows + Sum::row(2 * pair)) * square + Sum::column(2 * pair);
          put_pair(removed + place, gone.pairs[pair]);
          put_pair(dmoved + place, dgone.pairs[pair]);
        }
        put_values(out.v, at, first, dvalue, stage);
        dstate.add_tokens(dout, r);
        dstate.add_tokens(dgone, a);
        dstate.multiply(enter);
      }
      __syncthreads();

      // gradients of the products of vectors
#pragma unroll 1
      for (int which = warp_of(); which < 4; which += num_warps<N>) {
        Sum sum;
#pragma unroll
        for (int part = 0; part < parts; ++part) {
          const Left left = which < 2 ? left_of_transposed(dmoved + part * 16 * square, square) : left_of(dy + part * 16, stride<N>);
          add_product(sum, left,
                      which % 2 ? right_of_transposed(v + part * 16, stride<N>) : right_of(removed + part * 16 * square, square));
        }
        put(which == 0 ? dab : which == 1 ? dak : which == 2 ? drb : drk, square, lower(sum, which >= 2));
      }
      __syncthreads();

      // by keys: the other gradients, and what they tell of that of the decay
      {
        sum_products<N>(state, gradient, base);  // the state before the chunk as a part of that after it

        const auto of_tile = [&](const bfloat16* vectors, int i) {
          return widen(vectors[Sum::row(i) * stride<N> + own_rows + Sum::column(i)]);
        };
        const auto scale_of = [&](int i, int tokens_later) { return scale[(Sum::row(i) + tokens_later) * N + own_rows + Sum::column(i)]; };
        Sum of_after;  // terms that belong to the state after the chunk
        Sum of_tokens;
        {
          Sum dk;
#pragma unroll
          for (int part = 0; part < parts; ++part)
            add_product(dk, left_of(v + part * 16, stride<N>), right_of(gradient + part * 16 * stride<N> + own_rows, stride<N>));
#pragma unroll
          for (int i = 0; i < 8; ++i) of_after.values[i] = of_tile(k, i) * dk.values[i];
          add_product(dk, left_of_transposed(drk, square), right_of(r + own_rows, stride<N>));
          add_product(dk, left_of_transposed(dak, square), right_of(a + own_rows, stride<N>));
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            of_tokens.values[i] = -of_tile(k, i) * dk.values[i];
            dk.values[i] /= scale_of(i, 1);
          }
          put(stage, square, dk);
          put_tokens(out.k, at, first, stage);
        }
        {
          Sum db;
#pragma unroll
          for (int part = 0; part < parts; ++part)
            add_product(db, left_of_transposed(removed + part * 16 * square, square),
                        right_of(gradient + part * 16 * stride<N> + own_rows, stride<N>));
#pragma unroll
          for (int i = 0; i < 8; ++i) of_after.values[i] += of_tile(b, i) * db.values[i];
          add_product(db, left_of_transposed(drb, square), right_of(r + own_rows, stride<N>));
          add_product(db, left_of_transposed(dab, square), right_of(a + own_rows, stride<N>));
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            of_tokens.values[i] -= of_tile(b, i) * db.values[i];
            db.values[i] /= scale_of(i, 1);
          }
          put(stage, square, db);
          put_tokens(out.b, at, first, stage);
        }
        {
          Sum dr;
#pragma unroll
          for (int part = 0; part < parts; ++part)
            add_product(dr, left_of(dy + part * 16, stride<N>), right_of(state + part * 16 * stride<N> + own_rows, stride<N>));
          add_product(dr, left_of(drk, square), right_of(k + own_rows, stride<N>));
          add_product(dr, left_of(drb, square), right_of(b + own_rows, stride<N>));
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            of_tokens.values[i] += of_tile(r, i) * dr.values[i];
            terms[Sum::row(i) * N + own_rows + Sum::column(i)] = of_tokens.values[i];
            dr.values[i] *= scale_of(i, 1);
          }
          put(stage, square, dr);
          put_tokens(out.r, at, first, stage);
        }
        {
          Sum da;
#pragma unroll
          for (int part = 0; part < parts; ++part)
            add_product(da, left_of_transposed(dmoved + part * 16 * square, square),
                        right_of(state + part * 16 * stride<N> + own_rows, stride<N>));
          add_product(da, left_of(dak, square), right_of(k + own_rows, stride<N>));
          add_product(da, left_of(dab, square), right_of(b + own_rows, stride<N>));
          // `a` of a token meets the decay of those before it only
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int row = Sum::row(i);
            if (row > 0) terms[(row - 1) * N + own_rows + Sum::column(i)] += of_tile(a, i) * da.values[i];
            da.values[i] *= scale_of(i, 0);
          }
          put(stage, square, da);
          put_tokens(out.a, at, first, stage);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (i & 2) continue;
          float sum = of_after.values[i] + of_after.values[i + 2];
          for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(whole_warp, sum, distance);
          if (lane_of() < 4) base[own_rows + Sum::column(i)] += sum;
        }
      }
      __syncthreads();

      Eight dw;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float sum = base[share.column + i];
        for (int token = chunk - 1; token >= share.token; --token) sum += terms[token * N + share.column + i];
        dw.pack.values[i] = narrow<bfloat16>(own.counts ? sum * log_decay_of(own.w[i]).slope : 0.0f);
      }
      if (first + share.token < at.end)
        *reinterpret_cast<Pack<bfloat16>*>(static_cast<bfloat16*>(out.w) + at.vector(first + share.token) + share.column) = dw.pack;
    }
  }
  if (out.initial) dstate.put(out.initial, at, at.sequence);
}

}  // namespace

void wkv7_chunked_forward(const Wkv7& in, const float* initial, void* y, float* final, float* kept, void* stream) {
  with_size(in, [&](auto size) {
    constexpr int N = decltype(size)::value;
    const auto kernel = forward_kernel<N>;
    LAUNCH(kernel, blocks(in), dim3(num_threads<N>), 0, stream)(in, initial, y, final, kept);
  });
}

void wkv7_chunked_backward(const Wkv7& in, const float* kept, const void* dy, const float* dfinal, void* history,
                           const Wkv7Gradients& out, void* stream) {
  with_size(in, [&](auto size) {
    constexpr int N = decltype(size)::value;
    const auto kernel = backward_kernel<N>;
    LAUNCH(kernel, blocks(in), dim3(num_threads<N>), Memory<N>::bytes, stream)
    (in, kept, dy, dfinal, history, out);
  });
}

}  // namespace kernels
