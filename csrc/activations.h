// f' of every activation, from what its layer keeps: the rows of dfa_kernels/activations.py.
#pragma once

#include "abi.h"

namespace dfa {

DFA_DEVICE float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

DFA_DEVICE float gelu_slope(float a, bool tanh_form) {
  if (!tanh_form) {
    float density = expf(-0.5f * a * a) * 0.3989422804014327f;
    return 0.5f * (1.0f + erff(a * 0.7071067811865476f)) + a * density;
  }
  // 1 + tanh(u) = 2 logistic(2u), which does not cancel for negative u.
  float s = logistic(1.5957691216057308f * (a + 0.044715f * a * a * a));
  return s + a * s * (1.0f - s) * 1.5957691216057308f * (1.0f + 0.134145f * a * a);
}

// g · f'(a) from `kept`: the output h, or a itself where h does not tell (abs, gelu, silu, softplus, negative slopes).
DFA_DEVICE float slope_product(int activation, float g, float kept, float p, float q) {
  switch (activation) {
    case TANH:
      return g * (1.0f - kept * kept);
    case RELU:
      return kept <= 0.0f ? 0.0f : g;
    case LEAKY_RELU:
      return kept > 0.0f ? g : g * p;
    case ABS:
      return kept > 0.0f ? g : kept < 0.0f ? -g : g * kept;
    case SIGMOID:
      return g * (1.0f - kept) * kept;
    case GELU:
      return g * gelu_slope(kept, p != 0.0f);
    case SILU: {
      float s = logistic(kept);
      return g * s * (1.0f + kept * (1.0f - s));
    }
    case ELU:
      // p >= 0: kept is h, and f' = h + p; else it is a.
      if (kept > 0.0f) return g;
      return g * (p < 0.0f ? p * expf(kept) : kept + p);
    case SOFTPLUS:
      return kept * p > q ? g : g * logistic(kept * p);
    case HARDTANH:
      return kept <= p || kept >= q ? 0.0f : g;
    default:
      return g;
  }
}

}  // namespace dfa
