// Products of 16 x 16 matrices of bfloat16 numbers by one warp, summed in float32: tensor cores of sm_80 and later, plain code in the
// emulation. All lanes of a warp call these functions together. Rows of matrices in shared memory start at multiples of 16 bytes;
// a stride of 8 more than a multiple of 64 numbers keeps them in different banks.
#pragma once
#include "cuda_portable.h"

namespace kernels {

// What a lane holds of the two factors, pairs of neighbours along the inner dimension, and of their product.
struct alignas(16) Left {
  uint32_t pairs[4];
};
struct Right {
  uint32_t pairs[4];
};
struct Sum {
  float values[8] = {};
  // Place of element i in the matrix; elements 2 i and 2 i + 1 are neighbours in a row.
  static __device__ __forceinline__ int row(int i) { return int(threadIdx.x % 32) / 4 + (i & 2) * 4; }
  static __device__ __forceinline__ int column(int i) { return int(threadIdx.x % 4) * 2 + (i & 1) + (i & 4) * 2; }
};

__device__ __forceinline__ uint32_t pair_of(float low, float high) {
#ifdef __CUDACC__
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
#else
  return uint32_t(bfloat16_bits(low)) | uint32_t(bfloat16_bits(high)) << 16;
#endif
}
__device__ __forceinline__ float low_of(uint32_t pair) { return float_of(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) { return float_of(pair & 0xffff0000u); }

// Two neighbours at a multiple of 4 bytes.
__device__ __forceinline__ uint32_t get_pair(const bfloat16* from) {
#ifdef __CUDACC__
  return *reinterpret_cast<const uint32_t*>(from);
#else
  return uint32_t(from[0].bits) | uint32_t(from[1].bits) << 16;
#endif
}
__device__ __forceinline__ void put_pair(bfloat16* to, uint32_t pair) {
#ifdef __CUDACC__
  *reinterpret_cast<uint32_t*>(to) = pair;
#else
  to[0].bits = uint16_t(pair), to[1].bits = uint16_t(pair >> 16);
#endif
}

// A product as the left factor of the next.
__device__ __forceinline__ Left left_from(const Sum& sum) {
  Left left;
#pragma unroll
  for (int i = 0; i < 4; ++i) left.pairs[i] = pair_of(sum.values[2 * i], sum.values[2 * i + 1]);
  return left;
}

// Rounds a product into shared or global memory.
__device__ __forceinline__ void put(bfloat16* to, int stride, const Sum& sum) {
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    put_pair(to + Sum::row(i) * stride + Sum::column(i), pair_of(sum.values[i], sum.values[i + 1]));
  }
}

namespace fragments {

#ifdef __CUDACC__
template <bool transposed>
__device__ __forceinline__ void load(const bfloat16* row_of_lane, uint32_t* found) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row_of_lane));
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
                 : "r"(address)
                 : "memory");
#else
  __trap();
#endif
}
#endif

// The four 8 x 8 parts of a matrix lie side by side, or (down) first one below the other.
template <bool transposed, bool down>
__device__ __forceinline__ void load_parts(const bfloat16* from, int stride, uint32_t* found) {
  const int lane = threadIdx.x % 32;
#ifdef __CUDACC__
  const int row = down ? lane % 16 : lane / 16 * 8 + lane % 8, column = down ? lane / 16 * 8 : lane / 8 % 2 * 8;
  load<transposed>(from + row * stride + column, found);
#else
  for (int part = 0; part < 4; ++part) {
    const bfloat16* corner = from + (down ? part % 2 : part / 2) * 8 * stride + (down ? part / 2 : part % 2) * 8;
    const int along = lane % 4 * 2, across = lane / 4;
    const bfloat16 low = transposed ? corner[along * stride + across] : corner[across * stride + along];
    const bfloat16 high = transposed ? corner[(along + 1) * stride + across] : corner[across * stride + along + 1];
    found[part] = uint32_t(low.bits) | uint32_t(high.bits) << 16;
  }
#endif
}

}  // namespace fragments

// Factors from shared memory: element (row, column) lies at from[row * stride + column], or transposed at from[column * stride + row].
__device__ __forceinline__ Left left_of(const bfloat16* from, int stride) {
  Left left;
  fragments::load_parts<false, true>(from, stride, left.pairs);
  return left;
}
__device__ __forceinline__ Left left_of_transposed(const bfloat16* from, int stride) {
  Left left;
  fragments::load_parts<true, false>(from, stride, left.pairs);
  return left;
}
__device__ __forceinline__ Right right_of(const bfloat16* from, int stride) {
  Right right;
  fragments::load_parts<true, true>(from, stride, right.pairs);
  return right;
}
__device__ __forceinline__ Right right_of_transposed(const bfloat16* from, int stride) {
  Right right;
  fragments::load_parts<false, false>(from, stride, right.pairs);
  return right;
}

// sum += left right
__device__ __forceinline__ void add_product(Sum& sum, const Left& left, const Right& right) {
#ifdef __CUDACC__
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* values = sum.values + 4 * half;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(values[0]), "+f"(values[1]), "+f"(values[2]), "+f"(values[3])
        : "r"(left.pairs[0]), "r"(left.pairs[1]), "r"(left.pairs[2]), "r"(left.pairs[3]), "r"(right.pairs[2 * half]),
          "r"(right.pairs[2 * half + 1]));
  }
#else
  __trap();
#endif
#else
  struct Operands {
    Sum* sum;
    const Left* left;
    const Right* right;
  } mine = {&sum, &left, &right};
  emulation::Block::here()->exchange(
      whole_warp, emulation::pack(&mine), emulation::lane(), __LINE__, [](emulation::Fiber* warp, unsigned first, uint32_t) {
        if (first != 0) return;  // all lanes have come: their products are found at once
        float a[16][16], b[16][16];
        for (int lane = 0; lane < 32; ++lane) {
          const Operands* of = reinterpret_cast<const Operands*>(warp[lane].value);
          const int across = lane / 4, along = lane % 4 * 2;
          for (int part = 0; part < 4; ++part) {
            const uint32_t l = of->left->pairs[part], r = of->right->pairs[part];
            a[across + part % 2 * 8][along + part / 2 * 8] = low_of(l);
            a[across + part % 2 * 8][along + part / 2 * 8 + 1] = high_of(l);
            b[along + part % 2 * 8][across + part / 2 * 8] = low_of(r);
            b[along + part % 2 * 8 + 1][across + part / 2 * 8] = high_of(r);
          }
        }
        float c[16][16] = {};
        for (int i = 0; i < 16; ++i)
          for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 16; ++j) c[i][j] += a[i][k] * b[k][j];
        for (int lane = 0; lane < 32; ++lane) {
          const Operands* of = reinterpret_cast<const Operands*>(warp[lane].value);
          for (int i = 0; i < 8; ++i) of->sum->values[i] += c[lane / 4 + (i & 2) * 4][lane % 4 * 2 + (i & 1) + (i & 4) * 2];
        }
      });
#endif
}

}  // namespace kernels
