"""What becomes of a finished tile of a gradient: stored, or spent on the parameter's update where it stands.

The rules of `dfa_kernels.updates`, in float32 whatever the parameter's dtype is. ``hyper`` are RULE's `tile_numbers`;
or, if it is one address, numbers of its `row` are read from there when they are needed, which a graph's replay repeats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import pick, pick_flag


@triton.jit
def finish_layer(
    gradient, bias_gradient, layer, out, first_in, width_in, width_out, with_bias, weights, biases, weight_state0,
    weight_state1, bias_state0, bias_state1, hyper,
    WEIGHTS: tl.constexpr, BIASES: tl.constexpr, RULE: tl.constexpr, WEIGHT_SETS: tl.constexpr, BIAS_SETS: tl.constexpr,
):  # fmt: skip
    """ΔW [M, N] at outputs `out` and inputs from first_in on, and Δb [M] if `with_bias`, go where they belong."""
    if WEIGHTS:
        _finish_slices(
            gradient, out, first_in, width_in, tl.where(pick_flag(WEIGHTS, layer), width_out, 0), pick(weights, layer),
            pick(weight_state0, layer), pick(weight_state1, layer), hyper, pick(WEIGHT_SETS, layer), RULE,
        )  # fmt: skip
    if BIASES and with_bias:
        finish(
            bias_gradient, out, out < tl.where(pick_flag(BIASES, layer), width_out, 0), pick(biases, layer),
            pick(bias_state0, layer), pick(bias_state1, layer), hyper, pick(BIAS_SETS, layer), RULE,
        )  # fmt: skip


@triton.jit
def _finish_slices(
    gradient, out, first_in, width_in, width_out, destination, state0, state1, hyper, first, RULE: tl.constexpr
):
    """A slice of columns at a time: parameter and state beside a whole tile would not fit into the registers."""
    M: tl.constexpr = gradient.shape[0]
    N: tl.constexpr = gradient.shape[1]
    SLICE: tl.constexpr = 16 if RULE == "adamw" else 32
    if N > SLICE:
        pair = tl.permute(tl.reshape(gradient, (M, 2, N // 2)), (0, 2, 1))
        left, right = tl.split(pair)
        _finish_slices(left, out, first_in, width_in, width_out, destination, state0, state1, hyper, first, RULE)
        _finish_slices(
            right, out, first_in + N // 2, width_in, width_out, destination, state0, state1, hyper, first, RULE
        )  # fmt: skip
    else:
        column = (first_in + tl.arange(0, N)).to(out.dtype)
        inside = (out < width_out)[:, None] & (column < width_in)[None, :]
        at = out[:, None] * width_in + column[None, :]
        finish(gradient, at, inside, destination, state0, state1, hyper, first, RULE)


@triton.jit
def finish(gradient, at, inside, destination, state0, state1, hyper, first, RULE: tl.constexpr):
    """`gradient` (float32) of the entries `at` of the parameter goes to its destination; hyper[first] is its first."""
    before = parameter_before(gradient, at, inside, destination, RULE)
    early = velocity_before(gradient, at, inside, state0, hyper, first, RULE)
    spend(gradient, before, early, at, inside, destination, state0, state1, hyper, first, RULE)


@triton.jit
def parameter_before(anything, at, inside, parameter, RULE: tl.constexpr):
    """The entries `at` of the parameter as they are in memory; anything where RULE does not need them."""
    before = anything
    if RULE != "store":
        before = tl.load(parameter + at, mask=inside, other=0.0)
    return before


@triton.jit
def velocity_before(anything, at, inside, velocity, hyper, first, RULE: tl.constexpr):
    """The same of its velocity in half precision. Any other state is read last: a tile more than registers hold."""
    before = anything
    if RULE == "momentum" and velocity.dtype.element_ty.primitive_bitwidth == 16:
        wanted = tl.where(number(hyper, first + 2) != 0, inside, False)
        before = tl.load(velocity + at, mask=wanted, other=0.0)
    return before


@triton.jit
def spend(gradient, before, early, at, inside, destination, state0, state1, hyper, first, RULE: tl.constexpr):
    """`finish`, of a parameter and a velocity that have been read already."""
    if RULE == "store":
        _write(destination, at, inside, gradient)
    elif RULE == "sgd":
        _sgd(gradient, before.to(tl.float32), at, inside, destination, hyper, first)
    elif RULE == "momentum":
        _momentum(gradient, before.to(tl.float32), early, at, inside, destination, state0, hyper, first)
    else:
        tl.static_assert(RULE == "adamw")
        _adamw(gradient, before.to(tl.float32), at, inside, destination, state0, state1, hyper, first)


@triton.jit
def _read(tensor, at, inside):
    return tl.load(tensor + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(tensor, at, inside, value):
    tl.store(tensor + at, value.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def number(hyper, index):
    """One of the rule's numbers, from the launch's arguments or from memory."""
    return tl.load(hyper[0] + index) if len(hyper) == 1 else pick(hyper, index)


@triton.jit
def _sgd(gradient, w, at, inside, weight, hyper, first):
    rate, decay = number(hyper, first), number(hyper, first + 1)
    _write(weight, at, inside, w - rate * (gradient + decay * w))


@triton.jit
def _momentum(gradient, w, early, at, inside, weight, velocity, hyper, first):
    rate, decay = number(hyper, first), number(hyper, first + 1)
    momentum, nesterov = number(hyper, first + 2), number(hyper, first + 3)
    step = gradient + decay * w
    # A group without momentum leaves its buffer alone, as torch does.
    if momentum != 0:
        if velocity.dtype.element_ty.primitive_bitwidth == 16:
            old = early.to(tl.float32)
        else:
            old = _read(velocity, at, inside)
        moved = momentum * old + step
        _write(velocity, at, inside, moved)
        step = tl.where(nesterov != 0, step + momentum * moved, moved)
    _write(weight, at, inside, w - rate * step)


@triton.jit
def _adamw(gradient, w, at, inside, weight, mean, square, hyper, first):
    share1, beta2, share2 = number(hyper, first + 1), number(hyper, first + 2), number(hyper, first + 3)
    shrink, step, correction, eps = _adamw_step(hyper, first)
    # One after the other, since the registers hold not all of them.
    s = beta2 * _read(square, at, inside) + share2 * gradient * gradient
    _write(square, at, inside, s)
    m = _read(mean, at, inside)
    m += share1 * (gradient - m)
    _write(mean, at, inside, m)
    _write(weight, at, inside, w * shrink - step * m / (tl.sqrt(s) / correction + eps))


@triton.jit
def _adamw_step(hyper, first):
    """(factor of the weight, rate, root of the second moment's bias correction, eps)."""
    if len(hyper) == 1:
        row = hyper[0] + first
        rate, eps, count = tl.load(row), tl.load(row + 4), tl.load(row + 8)
        correction1, correction2 = complement(tl.load(row + 6) * count), complement(tl.load(row + 7) * count)
        shrink, step, correction = 1 - rate * tl.load(row + 5), rate / correction1, tl.sqrt(correction2)
    else:
        shrink, step = pick(hyper, first), pick(hyper, first + 4)
        correction, eps = pick(hyper, first + 5), pick(hyper, first + 6)
    return shrink, step, correction, eps


@triton.jit
def complement(x):
    """1 - exp(x) of x <= 0, near 0 too to float32's precision: there by its series, of which 2^-25 is left out."""
    near = tl.maximum(x, -1.0)
    series = near * 0 + 1.0
    for i in tl.static_range(10, 1, -1):
        series = 1.0 + series * near / i
    return tl.where(x > -1.0, -near * series, 1.0 - tl.exp(x))
