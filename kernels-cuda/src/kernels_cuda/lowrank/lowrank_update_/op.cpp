#include "op.h"

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
#include "../../include/products_torch.h"
#include "../../include/weights_cpu.h"

namespace kernels {

void lowrank_write(const Write& in, void*) {
  torch::stable::parallel_for(0, in.count, 16384, [&](int64_t begin, int64_t end) {
    if (in.type == Float::float32)
      write_range(in, static_cast<const float*>(in.back), begin, end);
    else
      write_range(in, static_cast<const bfloat16*>(in.back), begin, end);
  });
}

#ifdef KERNELS_HAVE_PRODUCT
namespace {

template <bool halves>
void write_product(const Write& in, const Factor& left, const Factor& right) {
  if (in.weight_type == Float::float32) {
    const auto nothing = [](auto...) {};
    rows_of_product<halves>(left, right, over_pieces, nothing, static_cast<float*>(in.weight), {in.decay, -in.alpha});
    return;
  }
  rows_of_product<halves>(left, right, over_pieces, [&](int64_t row, int64_t rows, const float* values) {
    Write part = in;
    part.weight = static_cast<bfloat16*>(in.weight) + row * right.size;
    part.first = row * right.size;
    write_range(part, values, 0, rows * right.size);
  });
}

}  // namespace
#endif

namespace {

// low <- basis matrix, or that added; a sum of float32 products, or of bfloat16 ones
void lowrank_project_op(Tensor low, const Tensor basis, const Tensor matrix, bool add, bool halves) {
#ifdef KERNELS_HAVE_PRODUCT
  const auto run = [&](auto kind) {
    thin_times_wide<kind.value>(factor(basis, false), factor(matrix, true), static_cast<float*>(low.data_ptr()), add, over_pieces);
  };
  halves ? run(std::true_type{}) : run(std::false_type{});
#else
  STD_TORCH_CHECK(false, "this build has no products");
#endif
}

// weight <- decay weight - alpha left right, without left right in memory
void lowrank_product_op(Tensor weight, const Tensor left, const Tensor right, double decay, double alpha, int64_t seed, int64_t offset,
                        bool halves) {
#ifdef KERNELS_HAVE_PRODUCT
  const Write in{weight.data_ptr(), nullptr,      float_type(weight), Float::float32, 0,
                 weight.numel(),    float(decay), float(alpha),       seed >= 0,      Random(seed, offset, rounding_stream)};
  halves ? write_product<true>(in, factor(left, false), factor(right, true))
         : write_product<false>(in, factor(left, false), factor(right, true));
#else
  STD_TORCH_CHECK(false, "this build has no products");
#endif
}

}  // namespace
}  // namespace kernels

// 0: no products; 1: those of float32 numbers; 2: those of bfloat16 numbers, too
extern "C" __attribute__((visibility("default"))) int kernels_lowrank_products() {
#ifdef KERNELS_HAVE_PRODUCT
  return kernels::have_halves ? 2 : 1;
#else
  return 0;
#endif
}

KERNELS_LIBRARY(lowrank, products) {
  products.impl("lowrank_project_", TORCH_BOX(&kernels::lowrank_project_op));
  products.impl("lowrank_product_", TORCH_BOX(&kernels::lowrank_product_op));
}
#endif

namespace kernels {
namespace {

void lowrank_write_op(Tensor weight, const Tensor back, double decay, double alpha, int64_t seed, int64_t offset, int64_t first) {
  const Stream stream(weight);
  lowrank_write({weight.data_ptr(), back.data_ptr(), float_type(weight), float_type(back), first, weight.numel(), float(decay),
                 float(alpha), seed >= 0, Random(seed, offset, rounding_stream)},
                stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) { library.impl("lowrank_write_", TORCH_BOX(&kernels::lowrank_write_op)); }
