"""What becomes of a finished tile of a gradient: stored, or spent on the parameter's update where it stands.

The rules of `dfa_kernels.updates`, in float32 whatever the parameter's dtype is. ``hyper`` are RULE's numbers for one
parameter, as `update_numbers` in `layers.py` prepares them.
"""

from __future__ import annotations

import triton
import triton.language as tl

NUMBERS = {"store": 0, "sgd": 2, "momentum": 4, "adamw": 7}


@triton.jit
def finish(gradient, at, inside, destination, state0, state1, hyper, first, RULE: tl.constexpr):
    """`gradient` (float32) of the entries `at` of the parameter goes to its destination; hyper[first] is its first."""
    if RULE == "store":
        tl.store(destination + at, gradient.to(destination.dtype.element_ty), mask=inside)
    elif RULE == "sgd":
        _sgd(gradient, at, inside, destination, hyper, first)
    elif RULE == "momentum":
        _momentum(gradient, at, inside, destination, state0, hyper, first)
    else:
        _adamw(gradient, at, inside, destination, state0, state1, hyper, first)


@triton.jit
def _read(tensor, at, inside):
    return tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(tensor, at, inside, value):
    tl.store(tensor + at, value.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _number(hyper, index):
    chosen = hyper[0]
    for i in tl.static_range(1, len(hyper)):
        chosen = tl.where(index == i, hyper[i], chosen)
    return chosen


@triton.jit
def _sgd(gradient, at, inside, weight, hyper, first):
    rate, decay = _number(hyper, first), _number(hyper, first + 1)
    w = _read(weight, at, inside)
    _write(weight, at, inside, w - rate * (gradient + decay * w))


@triton.jit
def _momentum(gradient, at, inside, weight, velocity, hyper, first):
    rate, decay = _number(hyper, first), _number(hyper, first + 1)
    momentum, nesterov = _number(hyper, first + 2), _number(hyper, first + 3)
    w, v = _read(weight, at, inside), _read(velocity, at, inside)
    gradient += decay * w
    moved = momentum * v + gradient
    step = tl.where(nesterov != 0, gradient + momentum * moved, moved)
    # A group without momentum leaves its buffer alone, as torch does.
    _write(velocity, at, inside, tl.where(momentum != 0, moved, v))
    _write(weight, at, inside, w - rate * tl.where(momentum != 0, step, gradient))


@triton.jit
def _adamw(gradient, at, inside, weight, mean, square, hyper, first):
    shrink, share1 = _number(hyper, first), _number(hyper, first + 1)
    beta2, share2 = _number(hyper, first + 2), _number(hyper, first + 3)
    step, correction, eps = _number(hyper, first + 4), _number(hyper, first + 5), _number(hyper, first + 6)
    w, m, s = _read(weight, at, inside), _read(mean, at, inside), _read(square, at, inside)
    m += share1 * (gradient - m)
    s = beta2 * s + share2 * gradient * gradient
    _write(mean, at, inside, m)
    _write(square, at, inside, s)
    _write(weight, at, inside, w * shrink - step * m / (tl.sqrt(s) / correction + eps))
