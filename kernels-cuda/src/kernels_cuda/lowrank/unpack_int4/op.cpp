#include "op.h"

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
#include "../../include/int4_cpu.h"
#include "../../include/products_torch.h"

namespace kernels {

void unpack_int4(const uint8_t* codes, const uint16_t* scale, const uint16_t* zero, void* out, Float type, int64_t count, void*) {
  const Packed from{codes, scale, zero};
  torch::stable::parallel_for(0, (count + int4_group - 1) / int4_group, 64, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t at = number * int4_group, stop = std::min(at + int4_group, count);
      if (type == Float::float32) {
        from.unpack(at, stop, static_cast<float*>(out) + at);
      } else {
        float values[int4_group];
        from.unpack(at, stop, values);
        for (int64_t i = at; i < stop; ++i) static_cast<bfloat16*>(out)[i] = narrow<bfloat16>(values[i - at]);
      }
    }
  });
}

namespace {

#ifdef KERNELS_HAVE_PRODUCT
// low[r][d] <- basis matrix, or that added; the basis r x k, in 4 bits, is unpacked eight rows at a time
template <bool halves>
void project(const Packed& basis, int64_t r, const Factor& matrix, float* low, bool add) {
  const int64_t k = matrix.length;
  const Words<halves> words(k);
  const int64_t rows = pieces(r, tile_rows) * tile_rows;
  const Buffer packed = buffer(rows * words.all), some = buffer(tile_rows * k);
  for (int64_t row = 0; row < r; row += tile_rows) {
    const int64_t count = std::min<int64_t>(tile_rows, r - row);
    basis.unpack(row * k, (row + count) * k, some.get());
    const Factor left{some.get(), Float::float32, k, true, count, k};
    for (int64_t begin = 0; begin < words.all; begin += words.part) {
      const int64_t end = std::min(begin + words.part, words.all);
      pack_along<float, halves>(left, 0, count, tile_rows, begin, end, packed.get() + rows * begin + row * (end - begin));
    }
  }
  packed_times_wide<halves>(packed.get(), r, matrix, low, add, over_pieces);
}
#endif

void project_int4_op(Tensor low, const Tensor codes, const Tensor scale, const Tensor zero, const Tensor matrix, bool add, bool halves) {
#ifdef KERNELS_HAVE_PRODUCT
  const Packed basis{pointer_to<uint8_t>(codes), pointer_to<uint16_t>(scale), pointer_to<uint16_t>(zero)};
  (halves ? project<true> : project<false>)(basis, low.size(0), factor(matrix, true), pointer_to<float>(low), add);
#else
  STD_TORCH_CHECK(false, "this build has no products");
#endif
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, products) { products.impl("project_int4_", TORCH_BOX(&kernels::project_int4_op)); }
#endif

namespace kernels {
namespace {

void unpack_int4_op(const Tensor codes, const Tensor scale, const Tensor zero, Tensor out) {
  const Stream stream(codes);
  unpack_int4(pointer_to<uint8_t>(codes), pointer_to<uint16_t>(scale), pointer_to<uint16_t>(zero), out.data_ptr(), float_type(out),
              out.numel(), stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) { library.impl("unpack_int4", TORCH_BOX(&kernels::unpack_int4_op)); }
