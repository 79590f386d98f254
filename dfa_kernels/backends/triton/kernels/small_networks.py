"""The grouped launch for small errors: every tile of every layer's weight gradient makes its own δ.

A program has one tile [BLOCK_M outputs, BLOCK_N inputs] of one layer. It holds its rows of U from the start, walks over
the batch, makes δ of BLOCK_K rows from the error, and adds δ x: δ never leaves the registers, and no program waits for
another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta import column_sums
from .epilogue import finish_layer
from .feedback_tile import error_tile, feedback_tile
from .tiles import locate, multiple, pick, pick_flag, slope_product


@triton.jit(
    do_not_specialize=[
        "error_size", "stride_row", "key0", "key1", "nonzeros", "widest", "rows",
    ]
)  # fmt: skip
def one_phase(
    error, stored, inputs, saved, dropout_mask, weights, biases, weight_state0, weight_state1, bias_state0, bias_state1,
    error_size, stride_row, stride_column, key0, key1, nonzeros, widest, rows, widths_in, widths_out, positions, scales,
    p, q, hyper,
    SOURCE: tl.constexpr, OUTPUT: tl.constexpr, DERIVATIVES: tl.constexpr, WHICH: tl.constexpr, DROPOUT: tl.constexpr,
    WEIGHTS: tl.constexpr, BIASES: tl.constexpr, RULE: tl.constexpr, WEIGHT_SETS: tl.constexpr,
    BIAS_SETS: tl.constexpr, ENTRY: tl.constexpr, DOT: tl.constexpr, DELTA_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr, ROUND: tl.constexpr, ALIGN: tl.constexpr, ALIGN_ERROR: tl.constexpr,
    INDEX: tl.constexpr, ONE_POSITION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BITS: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """Gradients of all layers, or their updates (paper, eq. 3).

    error [rows, error_size]; of layer i: inputs [rows · positions, widths_in], saved and dropout_mask
    [rows · positions, widths_out]. If OUTPUT, the last layer's δ is the error; a number in it that is not finite
    spreads over all of that layer's weight gradients. weights and biases are where results go.
    """
    error_size, stride_row = multiple(error_size, ALIGN_ERROR), multiple(stride_row, ALIGN_ERROR)
    layer, m, n = locate(tl.program_id(0), widths_in, widths_out, BLOCK_M, BLOCK_N, GROUP_M, WEIGHTS, BIASES)
    width_in, width_out = multiple(pick(widths_in, layer), ALIGN), pick(widths_out, layer)
    x, h = pick(inputs, layer), pick(saved, layer)
    is_output = OUTPUT and layer == len(widths_in) - 1
    # The output layer has no use for U nor for a saved tensor, and its width is rarely a multiple of anything.
    hidden_out = multiple(tl.where(is_output, 0, width_out), ALIGN)
    scale, own_p, own_q, which = pick(scales, layer), pick(p, layer), pick(q, layer), pick(WHICH, layer)

    out = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    column = (n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    component = tl.arange(0, BLOCK_E).to(INDEX)
    # A hidden layer's rows of U, or of the identity where δ is the error.
    identity = (out[:, None] == component[None, :]).to(DOT)

    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias_gradient = tl.zeros((BLOCK_M,), tl.float32)
    span = 1 if ONE_POSITION else pick(positions, layer)
    for position in range(span):
        # Units of a position follow those of the one before; beyond the layer's outputs there are none.
        first_unit = m * BLOCK_M + position * width_out
        unit = out + (position * width_out).to(INDEX)
        if SOURCE != "projection":
            limit = hidden_out * span
            U = feedback_tile(
                stored, key0, key1, first_unit, tl.where(out < hidden_out, unit, limit), limit, 0, error_size, nonzeros,
                SOURCE, BLOCK_E, BITS, ENTRY, DOT, ROUND,
            )  # fmt: skip
            U = tl.where(is_output, identity, U)
        for first in range(0, rows, BLOCK_K):
            row = (first + tl.arange(0, BLOCK_K)).to(INDEX)
            long_row = row * span + position
            if SOURCE == "projection":
                # A layer's P, or the error itself: both are [rows, units] in memory.
                source = tl.where(is_output, error, stored[0])
                at = row[None, :] * tl.where(is_output, stride_row, widest) + unit[:, None]
                projection = tl.load(source + at, mask=(out < width_out)[:, None] & (row < rows)[None, :], other=0.0)
            else:
                e = error_tile(error, row, rows, stride_row, component, error_size, stride_column)
                projection = tl.dot(U, e.to(DOT), input_precision=DELTA_PRECISION)
            at = long_row[None, :] * hidden_out + out[:, None]
            inside = (out < hidden_out)[:, None] & (row < rows)[None, :]
            value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
            delta = slope_product(projection * scale, value, own_p, own_q, which, DERIVATIVES)
            delta = tl.where(is_output, projection, delta)
            if DROPOUT:
                noisy_out = multiple(tl.where(pick_flag(DROPOUT, layer), hidden_out, 0), ALIGN)
                noisy = (out < noisy_out)[:, None] & (row < rows)[None, :]
                delta *= tl.load(pick(dropout_mask, layer) + at, mask=noisy, other=1.0).to(tl.float32)
            x_tile = tl.load(
                x + long_row[:, None] * width_in + column[None, :],
                mask=(row < rows)[:, None] & (column < width_in)[None, :], other=0.0,
            )  # fmt: skip
            gradient = tl.dot(delta.to(x_tile.dtype), x_tile, gradient, input_precision=PRECISION)
            if BIASES and n == 0:
                bias_gradient += tl.sum(delta, axis=1)

    if BIASES and n == 0 and is_output:
        # The identity product has rounded the error to what tensor cores take.
        bias_gradient = column_sums(error, rows, stride_row, out, error_size, stride_column)
    finish_layer(
        gradient, bias_gradient, layer, out, n * BLOCK_N, width_in, width_out, n == 0, weights, biases, weight_state0,
        weight_state1, bias_state0, bias_state1, hyper, WEIGHTS, BIASES, RULE, WEIGHT_SETS, BIAS_SETS,
    )  # fmt: skip
