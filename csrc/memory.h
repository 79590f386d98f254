// Reading and writing tensors whose dtype is known when the kernel runs, four neighbours at a time.
#pragma once

#include "abi.h"

namespace dfa {

constexpr int QUAD = 4;

template <class T>
constexpr int DTYPE_OF = BFLOAT16;
template <>
constexpr int DTYPE_OF<float> = FLOAT32;
template <>
constexpr int DTYPE_OF<Half> = FLOAT16;

template <class T>
DFA_DEVICE float read_as(const void* tensor, int64 at) {
  return to_float(static_cast<const T*>(tensor)[at]);
}

DFA_DEVICE float read(const void* tensor, int dtype, int64 at) {
  if (dtype == FLOAT32) return read_as<float>(tensor, at);
  return dtype == FLOAT16 ? read_as<Half>(tensor, at) : read_as<BFloat16>(tensor, at);
}

DFA_DEVICE void write(void* tensor, int dtype, int64 at, float value) {
  if (dtype == FLOAT32) {
    static_cast<float*>(tensor)[at] = value;
  } else if (dtype == FLOAT16) {
    convert(value, static_cast<Half*>(tensor)[at]);
  } else {
    convert(value, static_cast<BFloat16*>(tensor)[at]);
  }
}

// The entries at, at + 1, …, `count` of them, at most four. whole: there are four, and one access reaches them.
struct Run {
  int64 at;
  int count;
  bool whole;
};

// Whether one access reaches any four entries that begin at a multiple of four.
DFA_DEVICE bool reaches_quads(const void* tensor, int dtype, int width) {
  uint64 unit = dtype == FLOAT32 ? 16 : 8;
  return width % QUAD == 0 && reinterpret_cast<uint64>(tensor) % unit == 0;
}

struct alignas(8) HalfPiece {
  uint32 words[2];
};

DFA_DEVICE void unpack(uint32 word, int dtype, float& low, float& high) {
  Half a = {static_cast<uint16>(word)}, b = {static_cast<uint16>(word >> 16)};
  low = dtype == FLOAT16 ? to_float(a) : float_of_bits(word << 16);
  high = dtype == FLOAT16 ? to_float(b) : float_of_bits(word & 0xffff0000u);
}

DFA_DEVICE uint32 packed(float low, float high, int dtype) {
  if (dtype == FLOAT16) {
    Half a, b;
    convert(low, a);
    convert(high, b);
    return a.bits | static_cast<uint32>(b.bits) << 16;
  }
  BFloat16 a, b;
  convert(low, a);
  convert(high, b);
  return a.bits | static_cast<uint32>(b.bits) << 16;
}

// Missing entries are 0.
DFA_DEVICE void read_run(const void* tensor, int dtype, Run run, float (&values)[QUAD]) {
  if (!run.whole) {
    DFA_UNROLL
    for (int i = 0; i < QUAD; ++i) values[i] = i < run.count ? read(tensor, dtype, run.at + i) : 0.0f;
  } else if (dtype == FLOAT32) {
    Piece piece = *reinterpret_cast<const Piece*>(static_cast<const float*>(tensor) + run.at);
    DFA_UNROLL
    for (int i = 0; i < QUAD; ++i) values[i] = float_of_bits(piece.words[i]);
  } else {
    HalfPiece piece = *reinterpret_cast<const HalfPiece*>(static_cast<const uint16*>(tensor) + run.at);
    unpack(piece.words[0], dtype, values[0], values[1]);
    unpack(piece.words[1], dtype, values[2], values[3]);
  }
}

DFA_DEVICE void write_run(void* tensor, int dtype, Run run, const float (&values)[QUAD]) {
  if (!run.whole) {
    DFA_UNROLL
    for (int i = 0; i < QUAD; ++i) {
      if (i < run.count) write(tensor, dtype, run.at + i, values[i]);
    }
  } else if (dtype == FLOAT32) {
    Piece piece = {{bits_of(values[0]), bits_of(values[1]), bits_of(values[2]), bits_of(values[3])}};
    *reinterpret_cast<Piece*>(static_cast<float*>(tensor) + run.at) = piece;
  } else {
    HalfPiece piece = {{packed(values[0], values[1], dtype), packed(values[2], values[3], dtype)}};
    *reinterpret_cast<HalfPiece*>(static_cast<uint16*>(tensor) + run.at) = piece;
  }
}

}  // namespace dfa
