// Compiles the file named by KERNELS_TWIN once for each instruction set that the compiler was not told to assume, in a namespace of its
// own, with vectors as wide as its registers. LEVEL_CALL(function)(arguments) takes the best one that the processor has. A build for
// the machine's own processor (-march=native) has nothing to choose and compiles once.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "floats.h"

#if defined(__AVX512F__)
#define KERNELS_BASE_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#define KERNELS_BASE_BYTES 32
#else
#define KERNELS_BASE_BYTES 16
#endif

namespace kernels {

namespace level_base {
#define KERNELS_VECTOR_BYTES KERNELS_BASE_BYTES
#include "cpu_vector_body.h"
#include KERNELS_TWIN
#undef KERNELS_VECTOR_BYTES
}  // namespace level_base

// clang has no way to change the target of a whole file; tests of one instruction set define KERNELS_ONE_LEVEL
#if !defined(KERNELS_ONE_LEVEL) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && KERNELS_BASE_BYTES < 64

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace level_avx2 {
#define KERNELS_VECTOR_BYTES 32
#include "cpu_vector_body.h"
#include KERNELS_TWIN
#undef KERNELS_VECTOR_BYTES
}  // namespace level_avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace level_avx512 {
#define KERNELS_VECTOR_BYTES 64
#include "cpu_vector_body.h"
#include KERNELS_TWIN
#undef KERNELS_VECTOR_BYTES
}  // namespace level_avx512
#pragma GCC pop_options

inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
inline bool has_avx512() {
  static const bool has = has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}
#define LEVEL_CALL(function) (has_avx512() ? &level_avx512::function : has_avx2() ? &level_avx2::function : &level_base::function)
#else
#define LEVEL_CALL(function) (&level_base::function)
#endif

}  // namespace kernels
