#include "op.h"

#include <algorithm>

#include "../../include/registration.h"

#if !defined(KERNELS_CUDA_BUILD_CUDA) && !defined(KERNELS_CUDA_BUILD_EMULATED)
namespace kernels {
namespace {

template <class T>
void pack_group(const T* x, int64_t count, uint8_t* codes, uint16_t* scale, uint16_t* zero) {
  float values[int4_group];
  for (int64_t i = 0; i < count; ++i) values[i] = widen(x[i]);
  float smallest = values[0], greatest = values[0];
  for (int64_t i = 1; i < count; ++i) {
    smallest = std::min(smallest, values[i]);
    greatest = std::max(greatest, values[i]);
  }
  const Steps steps = Steps::of(smallest, greatest);
  *scale = steps.scale;
  *zero = steps.zero;
  uint8_t found[int4_group + 1];
  for (int64_t i = 0; i < count; ++i) found[i] = steps.code(values[i]);
  found[count] = 0;
  for (int64_t i = 0; i < (count + 1) / 2; ++i) codes[i] = uint8_t(found[2 * i] | found[2 * i + 1] << 4);
}

}  // namespace

void pack_int4(const void* x, Float type, int64_t count, uint8_t* codes, uint16_t* scale, uint16_t* zero, void*) {
  torch::stable::parallel_for(0, (count + int4_group - 1) / int4_group, 32, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t at = number * int4_group, size = std::min(int4_group, count - at);
      if (type == Float::float32)
        pack_group(static_cast<const float*>(x) + at, size, codes + at / 2, scale + number, zero + number);
      else
        pack_group(static_cast<const bfloat16*>(x) + at, size, codes + at / 2, scale + number, zero + number);
    }
  });
}

}  // namespace kernels
#endif

namespace kernels {
namespace {

void pack_int4_op(const Tensor x, Tensor codes, Tensor scale, Tensor zero) {
  const Stream stream(x);
  pack_int4(x.data_ptr(), float_type(x), x.numel(), pointer_to<uint8_t>(codes), pointer_to<uint16_t>(scale), pointer_to<uint16_t>(zero),
            stream.handle);
}

}  // namespace
}  // namespace kernels

KERNELS_LIBRARY(lowrank, library) { library.impl("pack_int4", TORCH_BOX(&kernels::pack_int4_op)); }
