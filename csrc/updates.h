// What becomes of a gradient: stored, or spent on the parameter where it stands. The rules of dfa_kernels/updates.py,
// in float32 whatever the parameter's dtype is.
#pragma once

#include "memory.h"

namespace dfa {

struct Destination {
  void* parameter;
  void* state0;
  void* state1;
  const float* hyper;  // UpdateRule.tile_numbers
  int rule, dtype;
  bool reaches_quads;
};

DFA_DEVICE Destination destination_of(const Arguments& a, void* parameter, void* const (&state)[2], int set, int width) {
  bool quads = reaches_quads(parameter, a.parameter_dtype, width);
  if (a.rule > SGD) quads = quads && reaches_quads(state[0], a.parameter_dtype, width);
  if (a.rule == ADAMW) quads = quads && reaches_quads(state[1], a.parameter_dtype, width);
  return {parameter, state[0], state[1], a.hyper + set, a.rule, a.parameter_dtype, quads};
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
  float shrink = to.hyper[0], share1 = to.hyper[1], beta2 = to.hyper[2], share2 = to.hyper[3];
  float rate = to.hyper[4], correction = to.hyper[5], eps = to.hyper[6];
  float mean[QUAD], square[QUAD];
  read_run(to.state0, to.dtype, run, mean);
  read_run(to.state1, to.dtype, run, square);
  DFA_UNROLL
  for (int i = 0; i < QUAD; ++i) {
    square[i] = beta2 * square[i] + share2 * gradient[i] * gradient[i];
    mean[i] += share1 * (gradient[i] - mean[i]);
    w[i] = w[i] * shrink - rate * mean[i] / (sqrtf(square[i]) / correction + eps);
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
