// How an op.cpp meets torch. The schema lives in binding.py, since it must exist before anything is compiled;
// each build of the sources only adds one implementation to it:
//   cpu       the C++ twin               key CPU   of torch.ops.<family>
//   cuda      the kernels of op.cu       key CUDA  of torch.ops.<family>
//   emulated  the same op.cu run by g++  key CPU   of torch.ops.<family>_emulated
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "floats.h"

#if defined(KERNELS_CUDA_BUILD_CUDA)
#define KERNELS_LIBRARY(family, library) STABLE_TORCH_LIBRARY_IMPL(family, CUDA, library)
#elif defined(KERNELS_CUDA_BUILD_EMULATED)
#define KERNELS_LIBRARY(family, library) STABLE_TORCH_LIBRARY_IMPL(family##_emulated, CPU, library)
#else
#define KERNELS_LIBRARY(family, library) STABLE_TORCH_LIBRARY_IMPL(family, CPU, library)
#endif

namespace kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Float float_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Float::float32;
    case ScalarType::Double:
      return Float::float64;
    case ScalarType::BFloat16:
      return Float::bfloat16;
    default:
      STD_TORCH_CHECK(false, "a float32, float64 or bfloat16 tensor is needed");
  }
}

template <class T>
T* pointer_to(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
const T* pointer_to(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

#ifdef KERNELS_CUDA_BUILD_CUDA
// Makes the tensor's device current and holds the stream that torch uses there.
struct Stream {
  explicit Stream(const Tensor& tensor) : guard(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* handle = nullptr;
};
#else
struct Stream {
  explicit Stream(const Tensor&) {}
  void* handle = nullptr;
};
#endif

}  // namespace kernels
