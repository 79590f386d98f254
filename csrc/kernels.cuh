// The kernels by their names, as profilers show them. Compiled for a GPU without tensor cores for bfloat16, those for
// bfloat16 are empty, and nothing starts them.
#pragma once

#include "strip.cuh"
#include "wide.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define DFA_BFLOAT16(statement)
#define DFA_RESIDENT 2
#else
#define DFA_BFLOAT16(statement) statement
#define DFA_RESIDENT 1  // of float32 products: ptxas would spill to have the registers for two
#endif

DFA_KERNEL(128, 3) dfa_strip_float32(DFA_GIVEN dfa::Arguments a) { dfa::strip<float>(a); }
DFA_KERNEL(128, 3) dfa_strip_float16(DFA_GIVEN dfa::Arguments a) { dfa::strip<dfa::Half>(a); }
DFA_KERNEL(128, 3) dfa_strip_bfloat16(DFA_GIVEN dfa::Arguments a) { DFA_BFLOAT16(dfa::strip<dfa::BFloat16>(a);) }

DFA_KERNEL(128, 4) dfa_deltas(DFA_GIVEN dfa::Arguments a) { dfa::deltas(a); }

DFA_KERNEL(256, DFA_RESIDENT) dfa_product_float32(DFA_GIVEN dfa::Arguments a) { dfa::product<float>(a); }
DFA_KERNEL(256, 2) dfa_product_float16(DFA_GIVEN dfa::Arguments a) { dfa::product<dfa::Half>(a); }
DFA_KERNEL(256, 2) dfa_product_bfloat16(DFA_GIVEN dfa::Arguments a) { DFA_BFLOAT16(dfa::product<dfa::BFloat16>(a);) }

// Numbers of the host to where kernels read them, without a copy that the host would wait for.
DFA_KERNEL(128, 1) dfa_write(float* to, DFA_GIVEN dfa::Numbers numbers, int count) {
  for (int i = dfa::thread(); i < count; i += 128) to[i] = numbers.values[i];
}
