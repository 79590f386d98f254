// What differs between the compilers that read these files: nvcc and NVRTC make kernels of them, a host compiler makes
// functions that emulator.h runs block by block, or with DFA_WITHOUT_BLOCKS plain ones.
#pragma once

#ifdef __CUDACC__
#define DFA_DEVICE __device__ __forceinline__
#define DFA_HD __host__ __device__ __forceinline__  // for the launching code as well
#define DFA_KERNEL(threads, programs) extern "C" __global__ void __launch_bounds__(threads, programs)
#define DFA_UNROLL _Pragma("unroll")
#define DFA_ROLLED _Pragma("unroll 1")
#define DFA_GIVEN const __grid_constant__
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#ifndef DFA_WITHOUT_BLOCKS
#include "emulator.h"
#endif
#define DFA_DEVICE inline
#define DFA_HD inline
#define DFA_KERNEL(threads, programs) extern "C" void
#define DFA_UNROLL
#define DFA_ROLLED
#define DFA_GIVEN const
#endif

namespace dfa {

typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef long long int64;

struct Half {
  uint16 bits;
};
struct BFloat16 {
  uint16 bits;
};
struct alignas(16) Piece {  // what one access moves
  uint32 words[4];
};

#ifdef __CUDACC__
// Read anew each time, so that what follows from it need not be kept in registers.
DFA_DEVICE int block() {
  int number;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(number));
  return number;
}
DFA_DEVICE int thread() { return threadIdx.x; }
DFA_DEVICE void sync() { __syncthreads(); }
DFA_DEVICE void sync_warp() { __syncwarp(); }
DFA_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char dynamic_shared[];
  return dynamic_shared;
}
DFA_DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Rounded one by one: left to itself the compiler fuses a product with the sum that it goes into.
DFA_DEVICE float product_of(float a, float b) { return __fmul_rn(a, b); }
DFA_DEVICE float sum_of(float a, float b) { return __fadd_rn(a, b); }
DFA_DEVICE float root_of(float x) { return __fsqrt_rn(x); }
DFA_DEVICE float float_of_bits(uint32 bits) { return __uint_as_float(bits); }
DFA_DEVICE uint32 bits_of(float x) { return __float_as_uint(x); }

DFA_DEVICE float to_float(Half x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
DFA_DEVICE void convert(float x, Half& narrow) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x)); }
#else
#ifndef DFA_WITHOUT_BLOCKS
inline int block() { return emulated_block(); }
inline int thread() { return emulated_thread(); }
inline void sync() { emulated_barrier(); }
inline void sync_warp() { emulated_barrier(); }
inline char* shared_memory() { return emulated_shared(); }
inline void prefetch(const void*) {}
#endif

// With -ffp-contract=off, or the host's compiler fuses them too.
inline float product_of(float a, float b) { return a * b; }
inline float sum_of(float a, float b) { return a + b; }
inline float root_of(float x) { return std::sqrt(x); }
inline float float_of_bits(uint32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32 bits_of(float x) {
  uint32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(Half x) {
  uint32 sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 0) return float_of_bits(bits_of(fraction * 0x1p-24f) | sign);
  return float_of_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}
inline void convert(float x, Half& narrow) {
  uint32 bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32 found;
  if (magnitude > 0x7f800000) {
    found = 0x7fff;
  } else if (magnitude >= 0x477ff000) {
    found = 0x7c00;  // what rounds to more than the largest number
  } else if (magnitude < 0x38800000) {
    found = static_cast<uint32>(std::nearbyint(float_of_bits(magnitude) * 0x1p24f));
  } else {
    found = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  narrow.bits = static_cast<uint16>(sign | found);
}
#endif

DFA_DEVICE float to_float(float x) { return x; }
DFA_DEVICE void convert(float x, float& same) { same = x; }
DFA_DEVICE float to_float(BFloat16 x) { return float_of_bits(static_cast<uint32>(x.bits) << 16); }
DFA_DEVICE void convert(float x, BFloat16& narrow) {
  uint32 bits = bits_of(x);
  narrow.bits = static_cast<uint16>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

DFA_DEVICE float step_of(float a, float b, float c) { return sum_of(product_of(a, b), c); }

template <class T>
DFA_HD T minimum(T a, T b) {
  return a < b ? a : b;
}
template <class T>
DFA_HD T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace dfa
