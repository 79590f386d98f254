// Philox4x32-10, and normals from its words: the bits of dfa_kernels/feedback/philox.py.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "platform.h"

namespace dfa {

struct Words {
  uint32 word[4];
};

DFA_DEVICE Words philox(uint32 counter0, uint32 counter1, uint32 counter2, uint32 counter3, uint32 key0, uint32 key1) {
  Words w = {{counter0, counter1, counter2, counter3}};
  DFA_UNROLL
  for (int round = 0; round < 10; ++round) {
    uint64 product0 = uint64{0xD2511F53u} * w.word[0], product1 = uint64{0xCD9E8D57u} * w.word[2];
    w = {{static_cast<uint32>(product1 >> 32) ^ w.word[1] ^ key0, static_cast<uint32>(product1),
          static_cast<uint32>(product0 >> 32) ^ w.word[3] ^ key1, static_cast<uint32>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return w;
}

// -2 log u of a positive, normal u, by a minimax polynomial in f where u = 2^exponent (1 + f).
DFA_DEVICE float twice_negative_log(float u) {
  int bits = static_cast<int>(bits_of(u)), exponent = (bits - 0x3F3504F3) >> 23;
  float f = sum_of(float_of_bits(static_cast<uint32>(bits - exponent * (1 << 23))), -1.0f);
  float value = step_of(0.15272724628448486f, f, -0.25524285435676575f);
  value = step_of(value, f, 0.26319196820259094f);
  value = step_of(value, f, -0.2840317189693451f);
  value = step_of(value, f, 0.3324682116508484f);
  value = step_of(value, f, -0.4000248312950134f);
  value = step_of(value, f, 0.5000163912773132f);
  value = step_of(value, f, -0.6666666269302368f);
  value = step_of(value, f, 1.0f);
  value = product_of(step_of(value, f, -2.0f), f);
  float power = static_cast<float>(exponent);
  value = sum_of(product_of(power, -2.857213530660374e-06f), value);
  return sum_of(product_of(power, -1.38629150390625f), value);
}

// Radius sqrt(-2 log u), u = word0 in (0, 1], times cosine and sine of the angle 2π word1 / 2^32 (Box, Muller 1958).
DFA_DEVICE void box_muller(uint32 word0, uint32 word1, float& cosine, float& sine) {
  float u = step_of(static_cast<float>(word0), 0x1p-32f, 0x1p-33f);
  float radius = root_of(twice_negative_log(u));
  float turn = product_of(static_cast<float>(static_cast<int>(word1)), 0x1p-31f);
  // |angle| = π/2 + πx, so its cosine is -sin πx and its sine cos πx.
  float x = sum_of(float_of_bits(bits_of(turn) & 0x7fffffffu), -0.5f), square = product_of(x, x);
  float c = step_of(-0.07643380761146545f, square, 0.5976253747940063f);
  c = step_of(c, square, -2.549957752227783f);
  c = step_of(c, square, 5.1677021980285645f);
  c = product_of(step_of(c, square, -3.141592502593994f), x);
  float s = step_of(-0.023963874205946922f, square, 0.23468376696109772f);
  s = step_of(s, square, -1.335161566734314f);
  s = step_of(s, square, 4.0587053298950195f);
  s = step_of(s, square, -4.934802055358887f);
  s = step_of(s, square, 1.0f);
  s = float_of_bits((bits_of(s) & 0x7fffffffu) | (word1 & 0x80000000u));
  cosine = product_of(c, radius);
  sine = product_of(s, radius);
}

}  // namespace dfa
