// Entries of the feedback matrix U: from memory, or anew from the seed as dfa_kernels/feedback/entries.py defines them.
//
// Signs and non-zeros are always made anew, also where they are stored: one call finds the few entries that matter,
// where what is stored would have to be searched. Their common factor is in the layers' scales.
#pragma once

#include "memory.h"
#include "philox.h"

namespace dfa {

enum Stream { GAUSSIAN_STREAM = 1, UNIFORM_STREAM, SIGN_STREAM, SPARSE_STREAM };

DFA_DEVICE Words row_words(const Arguments& a, int64 unit, uint32 call, uint32 stream) {
  return philox(call, static_cast<uint32>(unit), static_cast<uint32>(unit >> 32), stream, a.key0, a.key1);
}

DFA_DEVICE float rounded(float entry, int dtype) {
  if (dtype == FLOAT32) return entry;
  Half half;
  BFloat16 bfloat16;
  convert(entry, half);
  convert(entry, bfloat16);
  return dtype == FLOAT16 ? to_float(half) : to_float(bfloat16);
}

DFA_DEVICE void normal_entries(const Words& w, float (&u)[QUAD]) {
  box_muller(w.word[0], w.word[1], u[0], u[1]);
  box_muller(w.word[2], w.word[3], u[2], u[3]);
}

DFA_DEVICE void uniform_entries(const Words& w, float (&u)[QUAD]) {
  DFA_UNROLL
  for (int i = 0; i < QUAD; ++i) {
    // 2v - 1 as an odd integer over 2^24: exact in float32, where v itself is not.
    int odd = static_cast<int>(w.word[i] >> 8) * 2 + 1 - (1 << 24);
    u[i] = product_of(static_cast<float>(odd), 1.0323827311401874e-07f);  // sqrt(3) / 2^24
  }
}

DFA_DEVICE void sign_entries(const Words& w, int column, float (&u)[QUAD]) {
  uint32 low = column & 64 ? w.word[2] : w.word[0], high = column & 64 ? w.word[3] : w.word[1];
  uint32 bits = (column & 32 ? high : low) >> (column & 31);
  DFA_UNROLL
  for (int i = 0; i < QUAD; ++i) u[i] = bits >> i & 1 ? 1.0f : -1.0f;
}

// Row `unit` has one non-zero in each of its strata [⌊jE/k⌋, ⌊(j+1)E/k⌋), all rotated by an offset of the row.
DFA_DEVICE void nonzero_entries(const Arguments& a, int64 unit, int column, float (&u)[QUAD]) {
  int64 E = a.error_size, k = a.nonzeros;
  int64 offset = row_words(a, unit, 0, SPARSE_STREAM).word[0] * E >> 32;
  int64 known = -1;
  Words w = {};
  DFA_ROLLED
  for (int i = 0; i < QUAD; ++i) {
    int64 turned = column + i - offset, place = turned < 0 ? turned + E : turned;
    int64 j = ((place + 1) * k - 1) / E, first = j * E / k, width = (j + 1) * E / k - first;
    if (j / 2 != known) w = row_words(a, unit, static_cast<uint32>(1 + j / 2), SPARSE_STREAM);
    known = j / 2;
    uint32 position = j % 2 ? w.word[2] : w.word[0], sign = j % 2 ? w.word[3] : w.word[1];
    int64 within = static_cast<int64>(position) * width >> 32;
    float found = first + within != place ? 0.0f : sign & 1 ? 1.0f : -1.0f;
    DFA_UNROLL
    for (int n = 0; n < QUAD; ++n) u[n] = n == i ? found : u[n];
  }
}

// U[unit, column … column + 3], 0 beyond the error; column is a multiple of 4.
DFA_DEVICE void entries(const Arguments& a, int64 unit, int column, float (&u)[QUAD]) {
  int count = minimum(QUAD, a.error_size - column);
  if (a.source == MATRIX) {
    bool whole = count == QUAD && reaches_quads(a.stored, a.stored_dtype, a.error_size);
    read_run(a.stored, a.stored_dtype, {unit * a.error_size + column, count, whole}, u);
    return;
  }
  if (a.source == GAUSSIAN_SEED) {
    normal_entries(row_words(a, unit, column / 4, GAUSSIAN_STREAM), u);
  } else if (a.source == UNIFORM_SEED) {
    uniform_entries(row_words(a, unit, column / 4, UNIFORM_STREAM), u);
  } else if (a.source == SIGNS) {
    sign_entries(row_words(a, unit, column / 128, SIGN_STREAM), column, u);
  } else {
    nonzero_entries(a, unit, column, u);
  }
  DFA_UNROLL
  for (int i = 0; i < QUAD; ++i) u[i] = i < count ? rounded(u[i], a.stored_dtype) : 0.0f;
}

}  // namespace dfa
