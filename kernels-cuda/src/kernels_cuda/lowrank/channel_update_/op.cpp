#include "op.h"

#include "../../include/registration.h"

namespace kernels {
namespace {

Channels channels_of(const Tensor& gradient, const Tensor& factor, int64_t axis) {
  return {gradient.data_ptr(), float_type(gradient), pointer_to<float>(factor), factor.numel() == 1, axis == 0, gradient.size(1)};
}

}  // namespace
}  // namespace kernels

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
#include "../../include/products_torch.h"
#include "../../include/weights_cpu.h"

namespace kernels {
namespace {

// values <- values + scaled gradient, for `count` elements from number `first` on
template <class G>
void add_scaled(const Channels& in, int64_t first, int64_t count, float* values) {
  const G* gradient = static_cast<const G*>(in.gradient) + first;
  for (int64_t at = 0; at < count;) {
    const int64_t row = (first + at) / in.columns, column = (first + at) % in.columns, stop = std::min(count, at + in.columns - column);
    if (in.one || in.by_rows) {
      const float factor = in.of(row, 0);
      for (int64_t i = at; i < stop; ++i) values[i] = fmaf(factor, widen(gradient[i]), values[i]);
    } else {
      const float* factor = in.factor + column - at;
      for (int64_t i = at; i < stop; ++i) values[i] = fmaf(factor[i], widen(gradient[i]), values[i]);
    }
    at = stop;
  }
}

void add_scaled(const Channels& in, int64_t first, int64_t count, float* values) {
  if (in.type == Float::float32)
    add_scaled<float>(in, first, count, values);
  else
    add_scaled<bfloat16>(in, first, count, values);
}

// The sum of squares of a row, in 16 sums that the compiler puts into a vector.
template <class G>
float squares_of_row(const Channels& in, int64_t row) {
  const G* gradient = static_cast<const G*>(in.gradient) + row * in.columns;
  const bool same = in.one || in.by_rows;
  float sums[16] = {}, total = 0;
  int64_t column = 0;
  for (; column + 16 <= in.columns; column += 16)
    for (int i = 0; i < 16; ++i) {
      const float value = widen(gradient[column + i]) * (same ? 1 : in.factor[column + i]);
      sums[i] = fmaf(value, value, sums[i]);
    }
  for (; column < in.columns; ++column) {
    const float value = widen(gradient[column]) * (same ? 1 : in.factor[column]);
    sums[column % 16] = fmaf(value, value, sums[column % 16]);
  }
  for (const float sum : sums) total += sum;
  return same ? total * in.of(row, 0) * in.of(row, 0) : total;
}

void* element(const Write& in, int64_t number) {
  return static_cast<char*>(in.weight) + number * (in.weight_type == Float::float32 ? 4 : 2);
}

// `values` holds what is subtracted, alpha times, from the elements from number `at` on.
void write_values(const Write& in, int64_t at, int64_t count, const float* values) {
  Write part = in;
  part.weight = element(in, at);
  part.first = in.first + at;
  write_range(part, values, 0, count);
}

}  // namespace

void channel_squares(const Channels& in, float* sums, int64_t rows, void*) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / in.columns), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      sums[row] = in.type == Float::float32 ? squares_of_row<float>(in, row) : squares_of_row<bfloat16>(in, row);
  });
}

void channel_write(const Write& in, const Channels& channels, void*) {
  constexpr int64_t piece = 4 * group;  // whole groups of random bits, in the first cache
  torch::stable::parallel_for(0, (in.count + piece - 1) / piece, 4, [&](int64_t begin, int64_t end) {
    alignas(64) float values[piece];
    for (int64_t at = begin * piece; at < std::min(end * piece, in.count); at += piece) {
      const int64_t count = std::min(piece, in.count - at);
      for (int64_t i = 0; i < count; ++i)
        values[i] = !in.back                    ? 0
                    : in.type == Float::float32 ? static_cast<const float*>(in.back)[at + i]
                                                : widen(static_cast<const bfloat16*>(in.back)[at + i]);
      add_scaled(channels, at, count, values);
      write_values(in, at, count, values);
    }
  });
}

namespace {

// weight <- decay weight - alpha (left right + scaled gradient), without left right in memory
void channel_product_op(Tensor weight, const Tensor left, const Tensor right, const Tensor gradient, const Tensor scale, int64_t axis,
                        double decay, double alpha, int64_t seed, int64_t offset, bool halves) {
#ifdef KERNELS_HAVE_PRODUCT
  const Write in{weight.data_ptr(), nullptr,      float_type(weight), Float::float32, 0,
                 weight.numel(),    float(decay), float(alpha),       seed >= 0,      Random(seed, offset, rounding_stream)};
  const Channels channels = channels_of(gradient, scale, axis);
  const auto use = [&](int64_t row, int64_t rows, float* values) {
    const int64_t at = row * channels.columns, count = rows * channels.columns;
    add_scaled(channels, at, count, values);
    write_values(in, at, count, values);
  };
  const Factor first = factor(left, false), second = factor(right, true);
  halves ? rows_of_product<true>(first, second, over_pieces, use) : rows_of_product<false>(first, second, over_pieces, use);
#else
  STD_TORCH_CHECK(false, "this build has no products");
#endif
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, products) { products.impl("channel_product_", TORCH_BOX(&kernels::channel_product_op)); }
#endif

namespace kernels {
namespace {

void channel_squares_op(const Tensor gradient, const Tensor factor, int64_t axis, Tensor sums) {
  const Stream stream(gradient);
  channel_squares(channels_of(gradient, factor, axis), pointer_to<float>(sums), gradient.size(0), stream.handle);
}

void channel_write_op(Tensor weight, std::optional<Tensor> back, const Tensor gradient, const Tensor factor, int64_t axis, double decay,
                      double alpha, int64_t seed, int64_t offset, int64_t first) {
  const Stream stream(weight);
  channel_write({weight.data_ptr(), back ? back->data_ptr() : nullptr, float_type(weight), back ? float_type(*back) : Float::float32, first,
                 weight.numel(), float(decay), float(alpha), seed >= 0, Random(seed, offset, rounding_stream)},
                channels_of(gradient, factor, axis), stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) {
  library.impl("channel_squares_", TORCH_BOX(&kernels::channel_squares_op));
  library.impl("channel_write_", TORCH_BOX(&kernels::channel_write_op));
}
