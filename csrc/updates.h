// What becomes of a gradient: stored, or spent on the parameter where it stands. The rules of dfa_kernels/updates.py,
// in float32 whatever the parameter's dtype is. Their numbers are read from memory, so that a graph's replay reads them
// as they are then.
#pragma once

#include "memory.h"

namespace dfa {

struct Destination {
  void* parameter;
  void* state0;
  void* state1;
  const float* hyper;  // UpdateRule.row
  int rule, dtype;
  bool reaches_quads;
  float rate, shrink, correction;  // of AdamW
};

DFA_DEVICE Destination destination_of(const Arguments& a, void* parameter, void* const (&state)[2], int set, int width) {
  bool quads = reaches_quads(parameter, a.parameter_dtype, width);
  if (a.rule > SGD) quads = quads && reaches_quads(state[0], a.parameter_dtype, width);
  if (a.rule == ADAMW) quads = quads && reaches_quads(state[1], a.parameter_dtype, width);
  Destination to = {parameter, state[0], state[1], a.hyper + set, a.rule, a.parameter_dtype, quads, 0.0f, 0.0f, 0.0f};
  if (a.rule == ADAMW) {
    // 1 - beta^step from the logarithm of beta: in float32 the power itself would be too near to 1.
    float step = to.hyper[8];
    to.rate = to.hyper[0] / -expm1f(to.hyper[6] * step);
    to.correction = sqrtf(-expm1f(to.hyper[7] * step));
    to.shrink = 1.0f - to.hyper[0] * to.hyper[5];
  }
  return to;
}

DFA_DEVICE void spend_momentum(const Destination& to, Run run, const float (&gradient)[QUAD], float (&w)[QUAD]) {
  float rate = to.hyper[0], decay = to.hyper[1], momentum = to.hyper[2], nesterov = to.hyper[3];
  float velocity[QUAD];
  // A group without momentum leaves its buffer alone, as torch does.
  if (momentum != 0.0f) read_run(to.state0, to.dtype, run, velocity);
  DFA_UNROLL
  for (int i = 0; i < QUAD; ++i) {
    float step = gradient[i] + decay * w[i];
    if (momentum != 0.0f) {
      velocity[i] = momentum * velocity[i] + step;
      step = nesterov != 0.0f ? step + momentum * velocity[i] : velocity[i];
    }
    w[i] -= rate * step;
  }
  if (momentum != 0.0f) write_run(to.state0, to.dtype, run, velocity);
}

DFA_DEVICE void spend_adamw(const Destination& to, Run run, const float (&gradient)[QUAD], float (&w)[QUAD]) {
  float share1 = to.hyper[1], beta2 = to.hyper[2], share2 = to.hyper[3], eps = to.hyper[4];
  float mean[QUAD], square[QUAD];
  read_run(to.state0, to.dtype, run, mean);
  read_run(to.state1, to.dtype, run, square);
  DFA_UNROLL
  for (int i = 0; i < QUAD; ++i) {
    square[i] = beta2 * square[i] + share2 * gradient[i] * gradient[i];
    mean[i] += share1 * (gradient[i] - mean[i]);
    w[i] = w[i] * to.shrink - to.rate * mean[i] / (sqrtf(square[i]) / to.correction + eps);
  }
  write_run(to.state0, to.dtype, run, mean);
  write_run(to.state1, to.dtype, run, square);
}

// The gradient of the entries of `run` goes to its destination.
DFA_DEVICE void spend(const Destination& to, Run run, const float (&gradient)[QUAD]) {
  run.whole = run.count == QUAD && to.reaches_quads;
  if (to.rule == STORE) {
    write_run(to.parameter, to.dtype, run, gradient);
    return;
  }
  float w[QUAD];
  read_run(to.parameter, to.dtype, run, w);
  if (to.rule == SGD) {
    float rate = to.hyper[0], decay = to.hyper[1];
    DFA_UNROLL
    for (int i = 0; i < QUAD; ++i) w[i] -= rate * (gradient[i] + decay * w[i]);
  } else if (to.rule == MOMENTUM) {
    spend_momentum(to, run, gradient, w);
  } else {
    spend_adamw(to, run, gradient, w);
  }
  write_run(to.parameter, to.dtype, run, w);
}

}  // namespace dfa
