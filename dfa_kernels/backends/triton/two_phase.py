"""The grouped launch for large errors: δ of every layer first, then the weight gradients, without leaving the GPU.

Programs draw tickets from one counter. The first tickets are tiles of the projection, the others tiles of weight
gradients, which wait until the units they need are ready. Whoever waits holds a higher ticket than whoever it waits
for, and tickets are drawn in order, so the one waited for already runs: no deadlock, on any number of programs, and
one program alone may draw them all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta import write_deltas
from .epilogue import finish
from .tiles import locate, pick, pick_flag

RESET_BLOCK = tl.constexpr(1024)


@triton.jit(
    do_not_specialize=[
        "error_size", "stride_row", "stride_column", "key0", "key1", "nonzeros", "widest", "rows", "widths_in",
        "widths_out", "positions", "sizes", "scales", "p", "q", "projections", "total", "hyper",
    ]
)  # fmt: skip
def two_phase(
    counters, error, stored, inputs, kept, noise, deltas, weights, biases, weight_state0, weight_state1, bias_state0,
    bias_state1, error_size, stride_row, stride_column, key0, key1, nonzeros, widest, rows, widths_in, widths_out,
    positions, sizes, scales, p, q, projections, total, hyper,
    SOURCE: tl.constexpr, OUTPUT: tl.constexpr, DERIVATIVES: tl.constexpr, WHICH: tl.constexpr, NOISE: tl.constexpr,
    WEIGHTS: tl.constexpr, BIASES: tl.constexpr, RULE: tl.constexpr, WEIGHT_SETS: tl.constexpr,
    BIAS_SETS: tl.constexpr, ENTRY: tl.constexpr, DOT: tl.constexpr, DELTA_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
    ROUND: tl.constexpr, ALIGN: tl.constexpr, ALIGN_ERROR: tl.constexpr, INDEX: tl.constexpr, TMA: tl.constexpr,
    TMA_ERROR: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Gradients of all layers, or their updates (paper, eq. 3).

    counters: int32 zeros, [1 + tiles of units]; zeros again afterwards. deltas: room for δ of every hidden layer
    [rows · positions, widths_out]. projections: tiles of the projection [widest, rows]; total: those and the tiles of
    all gradients. Otherwise as for `one_phase`.
    """
    HIDDEN: tl.constexpr = len(sizes)
    ticket = tl.atomic_add(counters, 1)
    while ticket < total:
        if ticket < projections:
            write_deltas(
                ticket, error, stored, kept, noise, deltas, error_size, stride_row, stride_column, key0, key1,
                nonzeros, widest, rows, sizes, sizes, scales, p, q,
                SOURCE, DERIVATIVES, WHICH, (1 << HIDDEN) - 1, NOISE, 0, ENTRY, DOT, DELTA_PRECISION, ROUND, INDEX,
                BLOCK_U, BLOCK_R, BLOCK_E,
            )  # fmt: skip
            _announce(counters + 1 + ticket // tl.cdiv(rows, BLOCK_R), TMA)
        else:
            layer, m, n = locate(
                ticket - projections, widths_in, widths_out, BLOCK_M, BLOCK_N, GROUP_M, WEIGHTS, BIASES
            )  # fmt: skip
            width_in, width_out = pick(widths_in, layer), pick(widths_out, layer)
            if ALIGN > 1:
                width_in = tl.multiple_of(width_in, ALIGN)
            if OUTPUT and layer == len(widths_in) - 1:
                stride = stride_row
                if ALIGN_ERROR > 1:
                    stride = tl.multiple_of(stride, ALIGN_ERROR)
                gradient, bias_gradient = product_tile(
                    error, pick(inputs, layer), m * BLOCK_M, n * BLOCK_N, width_out, stride, stride_column, width_in,
                    rows, n == 0, PRECISION, BIASES != 0, INDEX, TMA_ERROR, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            else:
                span = pick(positions, layer)
                if ALIGN > 1:
                    width_out = tl.multiple_of(width_out, ALIGN)
                _wait(counters + 1, m * BLOCK_M, width_out, span, tl.cdiv(rows, BLOCK_R), BLOCK_M, BLOCK_U, TMA)
                gradient, bias_gradient = product_tile(
                    pick(deltas, layer), pick(inputs, layer), m * BLOCK_M, n * BLOCK_N, width_out, width_out, 1,
                    width_in, rows * span, n == 0, PRECISION, BIASES != 0, INDEX, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            out = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
            column = (n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
            if WEIGHTS:
                inside = (out < width_out)[:, None] & (column < width_in)[None, :] & pick_flag(WEIGHTS, layer)
                finish(
                    gradient, out[:, None] * width_in + column[None, :], inside, pick(weights, layer),
                    pick(weight_state0, layer), pick(weight_state1, layer), hyper, pick(WEIGHT_SETS, layer), RULE,
                )  # fmt: skip
            if BIASES:
                if n == 0:
                    finish(
                        bias_gradient, out, (out < width_out) & pick_flag(BIASES, layer), pick(biases, layer),
                        pick(bias_state0, layer), pick(bias_state1, layer), hyper, pick(BIAS_SETS, layer), RULE,
                    )  # fmt: skip
        ticket = tl.atomic_add(counters, 1)
    # Every program draws one ticket too many; whoever draws the last of these is the last to look at the counters.
    if ticket == total + tl.num_programs(0) - 1:
        used = 1 + tl.cdiv(widest, BLOCK_U)
        for first in range(0, used, RESET_BLOCK):
            at = first + tl.arange(0, RESET_BLOCK)
            tl.store(counters + at, tl.zeros((RESET_BLOCK,), tl.int32), mask=at < used)


@triton.jit
def _announce(ready, TMA: tl.constexpr):
    """All of the program's δ is in memory before the count says so."""
    if TMA:
        _order_with_tma()
    tl.debug_barrier()
    tl.atomic_add(ready, 1, sem="release")


@triton.jit
def _wait(
    ready, first_out, width_out, span, row_tiles, BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr, TMA: tl.constexpr
):
    """Returns once δ of outputs first_out … first_out + BLOCK_M is complete, at every position."""
    last_out = tl.minimum(first_out + BLOCK_M, width_out)
    for position in range(span):
        first = (position * width_out + first_out) // BLOCK_U
        end = tl.cdiv(position * width_out + last_out, BLOCK_U)
        for tile in range(first, end):
            while tl.atomic_add(ready + tile, 0, sem="acquire") < row_tiles:
                pass
    tl.debug_barrier()
    if TMA:
        _order_with_tma()


@triton.jit
def _order_with_tma():
    # δ is written by ordinary stores and read by the copy engine, which sees memory through another proxy.
    tl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def product_tile(
    delta, x, first_out, first_in, width_out, stride_row, stride_column, width_in, length, with_bias,
    PRECISION: tl.constexpr, BIAS: tl.constexpr, INDEX: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """δᵀ x [BLOCK_M, BLOCK_N] and the sums of δ [BLOCK_M], over all `length` rows of δ and x."""
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias_gradient = tl.zeros((BLOCK_M,), tl.float32)
    if TMA:
        delta_view = tl.make_tensor_descriptor(delta, [length, width_out], [stride_row, 1], [BLOCK_K, BLOCK_M])
        x_view = tl.make_tensor_descriptor(x, [length, width_in], [width_in, 1], [BLOCK_K, BLOCK_N])
    out = (first_out + tl.arange(0, BLOCK_M)).to(INDEX)
    column = (first_in + tl.arange(0, BLOCK_N)).to(INDEX)
    for first in range(0, length, BLOCK_K):
        if TMA:
            delta_tile = delta_view.load([first, first_out])
            x_tile = x_view.load([first, first_in])
        else:
            row = (first + tl.arange(0, BLOCK_K)).to(INDEX)
            inside = (row < length)[:, None]
            delta_at = delta + row[:, None] * stride_row + out[None, :] * stride_column
            delta_tile = tl.load(delta_at, mask=inside & (out < width_out)[None, :], other=0.0)
            x_at = x + row[:, None] * width_in + column[None, :]
            x_tile = tl.load(x_at, mask=inside & (column < width_in)[None, :], other=0.0)
        gradient = tl.dot(tl.trans(delta_tile.to(x_tile.dtype)), x_tile, gradient, input_precision=PRECISION)
        if BIAS:
            if with_bias:
                bias_gradient += tl.sum(delta_tile.to(tl.float32), axis=0)
    return gradient, bias_gradient
