// A block of threads takes a row of logits. Restrictions are a threshold, found bit by bit among the logits as ordered whole numbers:
// a token stays if fewer than top_k tokens and less than top_p of the weight stand above it. Then each thread sums the weights of
// neighbouring ids, and the one in whose part the draw falls walks through it.
#include "op.h"

#include "../../include/cuda_rows.h"

namespace kernels {
namespace {

struct Best {
  using Real = double;
  double value, place;
};
__device__ __forceinline__ Best joined(Best a, Best b) { return a.value > b.value || (a.value == b.value && a.place < b.place) ? a : b; }

struct Tally {
  using Real = double;
  double count, mass;
};
__device__ __forceinline__ Tally joined(Tally a, Tally b) { return {a.count + b.count, a.mass + b.mass}; }

// Whole numbers in the order of the floats.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = bits_of(value + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ uint64_t ordered(double value) {
  uint64_t bits;
  value += 0.0;
  memcpy(&bits, &value, sizeof bits);
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

template <class T>
struct Row {
  using Key = decltype(ordered(Wide<T>()));
  const T* logits;
  int64_t count;
  double highest, temperature;

  __device__ __forceinline__ Wide<T> at(int64_t i) const { return widen(logits[i]); }
  __device__ __forceinline__ double weight(int64_t i) const { return exp((double(at(i)) - highest) / temperature); }
  // How many tokens are above (or at) a threshold, and their weight; in every thread.
  __device__ __forceinline__ Tally above(Key threshold, bool equal) const {
    Tally mine{0, 0};
    for (int64_t i = threadIdx.x; i < count; i += row_threads) {
      const Key key = ordered(at(i));
      if (key > threshold || (equal && key == threshold)) mine = joined(mine, {1, weight(i)});
    }
    return joined_by_block(mine, {0, 0});
  }
};

// The sum of what the threads before this one hold; `whole` becomes that of all.
template <class Value>
__device__ __forceinline__ Value before(const Value* of_thread, Value* whole) {
  Value sum = 0, mine = 0;
  for (int thread = 0; thread < row_threads; ++thread) {
    if (thread == int(threadIdx.x)) mine = sum;
    sum += of_thread[thread];
  }
  *whole = sum;
  return mine;
}

template <class T>
__device__ int64_t drawn(const Row<T>& row, const Reveal& in, double u) {
  using Key = typename Row<T>::Key;
  Key threshold = 0;
  int64_t ties = 0;  // of those at the threshold the first so many stay
  if (in.restricted()) {
    const double most = in.top_k > 0 ? double(in.top_k) : double(row.count);
    const double share = in.top_p * row.above(0, true).mass;
    const auto stays = [&](Tally higher) { return higher.count < most && (in.top_p == 1 || higher.mass < share); };
    for (int bit = 8 * int(sizeof(Key)) - 1; bit >= 0; --bit)
      if (!stays(row.above(Key(threshold | ((Key(1) << bit) - 1)), false))) threshold |= Key(1) << bit;
    const Tally higher = row.above(threshold, false), reached = row.above(threshold, true);
    const int64_t equal = int64_t(reached.count - higher.count);
    const double weight = equal ? (reached.mass - higher.mass) / double(equal) : 0;
    while (ties < equal && stays({higher.count + double(ties), higher.mass + double(ties) * weight})) ++ties;
  }
  SHARED(int, of_ties, row_threads);
  SHARED(double, of_weight, row_threads);
  SHARED(int64_t, token, 1);
  const int64_t part = (row.count + row_threads - 1) / row_threads, first = threadIdx.x * part;
  const int64_t end = first + part < row.count ? first + part : row.count;
  int mine = 0;
  for (int64_t i = first; i < end; ++i) mine += int(ordered(row.at(i)) == threshold);
  of_ties[threadIdx.x] = mine;
  if (threadIdx.x == 0) token[0] = 0;
  __syncthreads();
  int all_ties;
  const int64_t earlier = before(of_ties, &all_ties);
  // visit(id, weight) of what stays of this thread's part, until it says no
  const auto each = [&](auto visit) {
    int64_t seen = earlier;
    for (int64_t i = first; i < end; ++i) {
      const Key key = ordered(row.at(i));
      const bool stays = key > threshold || (key == threshold && seen < ties);
      seen += int64_t(key == threshold);
      if (stays && !visit(i, row.weight(i))) return;
    }
  };
  double weight = 0;
  each([&](int64_t, double each_weight) {
    weight += each_weight;
    return true;
  });
  of_weight[threadIdx.x] = weight;
  __syncthreads();
  double whole;
  const double from = before(of_weight, &whole);
  double target = u * whole;
  if (!(target < whole)) target = nextafter(whole, 0.0);
  if (from <= target && target < from + weight) {
    double passed = from;
    each([&](int64_t i, double each_weight) {
      if (each_weight > 0) token[0] = i;
      passed += each_weight;
      return !(passed > target);
    });
  }
  __syncthreads();
  return token[0];
}

template <class T>
__global__ void __launch_bounds__(row_threads) reveal_kernel(Reveal in) {
  const int64_t number = blockIdx.x;
  const T* logits = static_cast<const T*>(in.logits) + number * in.width;
  const double infinite = double(INFINITY);
  Best mine{-infinite, double(in.valid - 1)};
  for (int64_t i = threadIdx.x; i < in.valid; i += row_threads) mine = joined(mine, {double(widen(logits[i])), double(i)});
  const Best best = joined_by_block(mine, {-infinite, double(in.valid - 1)});
  int64_t token = int64_t(best.place);
  if (in.temperature > 0) token = drawn(Row<T>{logits, in.valid, best.value, in.temperature}, in, in.uniform(number));
  // the plain model's, in float64
  const double whole = Row<T>{logits, in.valid, best.value, 1}.above(0, true).mass;
  if (threadIdx.x == 0) {
    const double logprob = double(widen(logits[token])) - best.value - log(whole);
    in.token[number] = token;
    in.logprob[number] = float(logprob);
    in.confidence[number] = float(exp(logprob));
  }
}

}  // namespace

void reveal(const Reveal& in, Float type, void* stream) {
  const auto kernel = type == Float::float32   ? reveal_kernel<float>
                      : type == Float::float64 ? reveal_kernel<double>
                                               : reveal_kernel<bfloat16>;
  LAUNCH(kernel, dim3(unsigned(in.rows)), dim3(row_threads), 0, stream)(in);
}

}  // namespace kernels
