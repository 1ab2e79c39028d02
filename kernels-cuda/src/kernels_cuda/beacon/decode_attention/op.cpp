#include "op.h"

#include <algorithm>
#include <vector>

#include "../../include/cpu_rows.h"
#include "../../include/rope_rows_torch.h"

namespace kernels {

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace {

constexpr int64_t split_keys = DecodeAttention::split;

// Room that a thread keeps from split to split.
template <class T>
struct Room {
  int64_t width;  // of a query, rounded up to whole vectors and filled with zeros
  std::vector<Wide<T>> queries;
  std::vector<Wide<T>> scores = std::vector<Wide<T>>(4 * split_keys);

  explicit Room(int64_t size) : width((size + num_lanes<T> - 1) / num_lanes<T> * num_lanes<T>), queries(size_t(4 * width)) {}
};

// to[i] = the sum of vector i, for as many vectors as a vector has lanes.
template <class T>
void sums_of(Lanes<T>* values, Wide<T>* to) {
  if constexpr (num_lanes<T> == 1) {
    to[0] = values[0];
  } else {
    store(to, sums<num_lanes<T>>(values));
  }
}

// Scores of `count` keys with each query; those behind, up to a whole vector, are minus infinity.
template <class T, int heads>
void score(const DecodeAttention& in, const T* keys, int64_t stride, int64_t count, Room<T>& room) {
  constexpr int64_t lanes_of = num_lanes<T>;
  for (int64_t begin = 0; begin < count; begin += lanes_of) {
    Lanes<T> found[heads][lanes_of];
    for (int64_t n = 0; n < lanes_of; ++n) {
      const T* const key = keys + std::min(begin + n, count - 1) * stride;
      Lanes<T> own[heads];
      for (int h = 0; h < heads; ++h) own[h] = filled<T>(0);
      each_lanes<T>(0, in.size, [&](int64_t j, int64_t present) {
        const Lanes<T> part = get(key + j, present, Wide<T>(0));
        for (int h = 0; h < heads; ++h) own[h] += part * load(room.queries.data() + h * room.width + j);
      });
      for (int h = 0; h < heads; ++h) found[h][n] = own[h];
    }
    for (int h = 0; h < heads; ++h) {
      Wide<T>* const to = room.scores.data() + h * split_keys + begin;
      sums_of<T>(found[h], to);
      for (int64_t n = count - begin; n < lanes_of; ++n) to[n] = -std::numeric_limits<Wide<T>>::infinity();
    }
  }
}

// Scores become exp(score - maximum); returns their log-sum.
template <class T>
LogSum<T> softmax(Wide<T>* scores, int64_t count) {
  LogSum<T> found;
  Lanes<T> maximum = filled<T>(found.maximum), total = filled<T>(0);
  for (int64_t n = 0; n < count; n += num_lanes<T>) maximum = larger(load(scores + n), maximum);
  found.maximum = largest(maximum);
  for (int64_t n = 0; n < count; n += num_lanes<T>) {
    const Lanes<T> weight = exponential(load(scores + n) - found.maximum);
    store(scores + n, weight);
    total += weight;
  }
  found.total = sum(total);
  return found;
}

// Columns [j, j + columns vectors) of the weighted sum of values.
template <class T, int heads, int columns>
void weigh(const T* values, int64_t stride, int64_t count, int64_t present, const Wide<T>* weights, Wide<T>* out, int64_t out_stride,
           const LogSum<T>* of) {
  Lanes<T> found[heads][columns];
  for (int h = 0; h < heads; ++h)
    for (int c = 0; c < columns; ++c) found[h][c] = filled<T>(0);
  for (int64_t n = 0; n < count; ++n) {
    Lanes<T> value[columns];
    for (int c = 0; c < columns; ++c)
      value[c] = get(values + n * stride + c * num_lanes<T>, columns > 1 ? num_lanes<T> : present, Wide<T>(0));
    for (int h = 0; h < heads; ++h) {
      const Lanes<T> weight = filled<T>(weights[h * split_keys + n]);
      for (int c = 0; c < columns; ++c) found[h][c] += weight * value[c];
    }
  }
  for (int h = 0; h < heads; ++h)
    for (int c = 0; c < columns; ++c)
      put(out + h * out_stride + c * num_lanes<T>, found[h][c] / Wide<T>(of[h].total), columns > 1 ? num_lanes<T> : present);
}

// `heads` queries of a group, from `head` on, over one split.
template <class T, int heads>
void read_split(const DecodeAttention& in, int64_t b, int64_t g, int64_t head, int64_t number, Room<T>& room) {
  const Split split(in, b, number);
  const int64_t count = split.last - split.first, splits = in.splits(), row = (b * in.groups + g) * in.each + head;
  Wide<T>* const lses = static_cast<Wide<T>*>(in.lses) + row * splits + number;
  if (count <= 0) {
    for (int h = 0; h < heads; ++h) lses[h * splits] = -std::numeric_limits<Wide<T>>::infinity();
    return;
  }
  for (int h = 0; h < heads; ++h) {
    const T* const query = in.q.row<T>(b, g, head + h);
    for (int64_t j = 0; j < in.size; ++j) room.queries[size_t(h * room.width + j)] = widen(query[j]) * Wide<T>(in.scale);
  }
  const Rows &k = in.k[split.segment], &v = in.v[split.segment];
  score<T, heads>(in, k.row<T>(b, g, split.first), k.stride, count, room);
  LogSum<T> found[heads];
  for (int h = 0; h < heads; ++h) {
    found[h] = softmax<T>(room.scores.data() + h * split_keys, count);
    lses[h * splits] = Wide<T>(found[h].value());
  }
  const T* const values = v.row<T>(b, g, split.first);
  Wide<T>* const out = static_cast<Wide<T>*>(in.parts) + (row * splits + number) * in.size;
  constexpr int64_t wide = 4 * num_lanes<T>;
  int64_t j = 0;
  for (; j + wide <= in.size; j += wide)
    weigh<T, heads, 4>(values + j, v.stride, count, 0, room.scores.data(), out + j, splits * in.size, found);
  each_lanes<T>(j, in.size, [&](int64_t at, int64_t present) {
    weigh<T, heads, 1>(values + at, v.stride, count, present, room.scores.data(), out + at, splits * in.size, found);
  });
}

template <class T>
void join(const DecodeAttention& in, int64_t row) {
  const int64_t splits = in.splits();
  const Wide<T>* const lses = static_cast<const Wide<T>*>(in.lses) + row * splits;
  const Wide<T>* const parts = static_cast<const Wide<T>*>(in.parts) + row * splits * in.size;
  LogSum<T> all;
  for (int64_t s = 0; s < splits; ++s) all.maximum = std::max(all.maximum, lses[s]);
  for (int64_t s = 0; s < splits; ++s) all.total += std::exp(double(lses[s]) - all.maximum);
  const bool some = all.total > 0;
  static_cast<Wide<T>*>(in.lse)[row] = some ? Wide<T>(all.value()) : -std::numeric_limits<Wide<T>>::infinity();
  each_lanes<T>(0, in.size, [&](int64_t j, int64_t present) {
    Lanes<T> found = filled<T>(0);
    for (int64_t s = 0; s < splits; ++s) {
      // a split without keys was never written
      if (lses[s] == -std::numeric_limits<Wide<T>>::infinity()) continue;
      found += get(parts + s * in.size + j, present, Wide<T>(0)) * filled<T>(Wide<T>(std::exp(double(lses[s]) - all.maximum) / all.total));
    }
    put(static_cast<T*>(in.out) + row * in.size + j, found, present);
  });
}

template <class T>
void attend(const DecodeAttention& in) {
  const int64_t splits = in.splits(), groups = in.batch * in.groups;
  torch::stable::parallel_for(0, groups * splits, 1, [&](int64_t begin, int64_t end) {
    Room<T> room(in.size);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / splits / in.groups, g = at / splits % in.groups, number = at % splits;
      int64_t head = 0;
      for (; head + 4 <= in.each; head += 4) read_split<T, 4>(in, b, g, head, number, room);
      if (in.each - head == 3) read_split<T, 3>(in, b, g, head, number, room);
      if (in.each - head == 2) read_split<T, 2>(in, b, g, head, number, room);
      if (in.each - head == 1) read_split<T, 1>(in, b, g, head, number, room);
    }
  });
  torch::stable::parallel_for(0, groups * in.each, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) join<T>(in, row);
  });
}

}  // namespace

void decode_attention(const DecodeAttention& in, void*) {
  with_type(in.type, [&](auto one) { attend<decltype(one)>(in); });
}
#endif

namespace {

void decode_op(const Tensor q, const Tensor k_mem, const Tensor v_mem, const Tensor mem_len, const Tensor k_raw, const Tensor v_raw,
               const Tensor raw_len, double scale, Tensor out, Tensor lse, Tensor parts, Tensor lses) {
  const Stream stream(q);
  decode_attention({float_type(q), q.size(0), q.size(1), q.size(2), q.size(3), {k_mem.size(2), k_raw.size(2)},
                    {pointer_to<int32_t>(mem_len), pointer_to<int32_t>(raw_len)}, scale, rows(q), {rows(k_mem), rows(k_raw)},
                    {rows(v_mem), rows(v_raw)}, out.data_ptr(), lse.data_ptr(), parts.data_ptr(), lses.data_ptr()},
                   stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(beacon, library) { library.impl("decode_attention_", TORCH_BOX(&kernels::decode_op)); }
