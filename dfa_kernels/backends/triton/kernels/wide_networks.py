"""The grouped launch for large errors: δ of every layer first, then the weight gradients, without leaving the GPU.

Programs draw tickets from one counter. The first tickets are tiles of the projection, the others tiles of weight
gradients, which wait until the units they need are ready. Whoever waits holds a higher ticket than whoever it waits
for, and tickets are drawn in order, so the one waited for already runs: no deadlock, on any number of programs, and
one program alone may draw them all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta import column_sums, sum_over_tiles, write_deltas
from .epilogue import finish_layer
from .feedback_tile import error_tile
from .product import product_of_pointers
from .tiles import locate, multiple, pick, pick_flag

RESET_BLOCK = tl.constexpr(1024)


@triton.jit(
    do_not_specialize=[
        "error_size", "stride_row", "key0", "key1", "nonzeros", "widest", "rows", "delta_width", "delta_stride",
        "copies", "projections", "total",
    ]
)  # fmt: skip
def two_phase(
    counters, error, stored, inputs, saved, dropout_mask, deltas, sums, weights, biases, weight_state0, weight_state1,
    bias_state0, bias_state1, error_size, stride_row, stride_column, key0, key1, nonzeros, widest, rows, widths_in,
    widths_out, positions, sizes, first_sums, scales, p, q, delta_width, delta_stride, copies, projections, total,
    hyper,
    SOURCE: tl.constexpr, OUTPUT: tl.constexpr, DERIVATIVES: tl.constexpr, WHICH: tl.constexpr, DROPOUT: tl.constexpr,
    WEIGHTS: tl.constexpr, BIASES: tl.constexpr, RULE: tl.constexpr, WEIGHT_SETS: tl.constexpr,
    BIAS_SETS: tl.constexpr, ENTRY: tl.constexpr, DOT: tl.constexpr, DELTA_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr, ROUND: tl.constexpr, ALIGN: tl.constexpr, ALIGN_ERROR: tl.constexpr,
    INDEX: tl.constexpr, TMA: tl.constexpr, COPY: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Gradients of all layers, or their updates (paper, eq. 3).

    counters: int32 zeros, one and one for every tile of units; zeros again afterwards. deltas: workspace for δ of every
    hidden layer [rows · positions, widths_out], then the output layer's δ [rows, delta_width] in rows of delta_stride:
    the error itself or, if COPY, workspace for a copy of it. sums: for the sums of δ over each tile of rows, as
    `write_deltas` says. The first `copies` tickets copy, the next `projections` make δ, and all up to `total`
    gradients. Otherwise as for `strip`.
    """
    HIDDEN: tl.constexpr = len(sizes)
    row_tiles, unit_tiles = tl.cdiv(rows, BLOCK_R), tl.cdiv(widest, BLOCK_U)
    ticket = tl.atomic_add(counters, 1)
    while ticket < total:
        if COPY and ticket < copies:
            _copy_error(
                ticket, error, pick(deltas, len(deltas) - 1), rows, error_size, stride_row, stride_column, delta_width,
                INDEX, BLOCK_U, BLOCK_R,
            )  # fmt: skip
            _announce(counters + 1 + unit_tiles + ticket // row_tiles, TMA)
        elif ticket < copies + projections:
            write_deltas(
                ticket - copies, error, stored, saved, dropout_mask, deltas, sums, error_size, stride_row,
                stride_column, key0, key1, nonzeros, widest, rows, sizes, sizes, first_sums, sizes, scales, p, q,
                SOURCE, DERIVATIVES, WHICH, (1 << HIDDEN) - 1, DROPOUT, BIASES, 0, ENTRY, DOT, DELTA_PRECISION, ROUND,
                ALIGN, ALIGN_ERROR, INDEX, BLOCK_U, BLOCK_R, BLOCK_E, BITS,
            )  # fmt: skip
            _announce(counters + 1 + (ticket - copies) // row_tiles, TMA)
        else:
            layer, m, n = locate(
                ticket - copies - projections, widths_in, widths_out, BLOCK_M, BLOCK_N, GROUP_M, WEIGHTS, BIASES
            )  # fmt: skip
            is_output = OUTPUT and layer == len(widths_in) - 1
            width_in, width_out = multiple(pick(widths_in, layer), ALIGN), pick(widths_out, layer)
            width_delta = multiple(tl.where(is_output, delta_width, width_out), ALIGN)
            stride = multiple(tl.where(is_output, delta_stride, width_out), ALIGN)
            span = pick(positions, layer)
            if COPY or not is_output:
                ready = counters + 1 + tl.where(is_output, unit_tiles, 0)
                _wait(ready, m * BLOCK_M, width_delta, span, row_tiles, BLOCK_M, BLOCK_U, TMA)
            gradient = _product(
                pick(deltas, layer), pick(inputs, layer), m * BLOCK_M, n * BLOCK_N, width_delta, stride, width_in,
                rows * span, PRECISION, INDEX, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            out = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
            bias_gradient = tl.zeros((BLOCK_M,), tl.float32)
            if BIASES and n == 0:
                if is_output:
                    bias_gradient = column_sums(error, rows, stride_row, out, error_size, stride_column)
                elif pick_flag(BIASES, layer):
                    bias_gradient = sum_over_tiles(sums, pick(first_sums, layer), out, width_out, span, row_tiles)
            finish_layer(
                gradient, bias_gradient, layer, out, n * BLOCK_N, width_in, width_out, n == 0, weights, biases,
                weight_state0, weight_state1, bias_state0, bias_state1, hyper,
                WEIGHTS, BIASES, RULE, WEIGHT_SETS, BIAS_SETS,
            )  # fmt: skip
        ticket = tl.atomic_add(counters, 1)
    # Every program draws one ticket too many; whoever draws the last of these is the last to look at the counters.
    if ticket == total + tl.num_programs(0) - 1:
        used = 1 + unit_tiles + (tl.cdiv(delta_width, BLOCK_U) if COPY else 0)
        for first in range(0, used, RESET_BLOCK):
            at = first + tl.arange(0, RESET_BLOCK)
            tl.store(counters + at, tl.zeros((RESET_BLOCK,), tl.int32), mask=at < used)


@triton.jit
def _copy_error(
    tile, error, copy, rows, error_size, stride_row, stride_column, width,
    INDEX: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of the error as the output layer's δ: in its dtype, rows of `width`, zeros behind the last component."""
    row_tiles = tl.cdiv(rows, BLOCK_R)
    column = ((tile // row_tiles) * BLOCK_U + tl.arange(0, BLOCK_U)).to(INDEX)
    row = ((tile % row_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)).to(INDEX)
    e = error_tile(error, row, rows, stride_row, column, error_size, stride_column)
    inside = (column < width)[:, None] & (row < rows)[None, :]
    tl.store(copy + row[None, :] * width + column[:, None], e.to(copy.dtype.element_ty), mask=inside)


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
def _product(
    delta, x, first_out, first_in, width_out, stride, width_in, length,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """δᵀ x [BLOCK_M, BLOCK_N], over all `length` rows of δ and x."""
    if TMA:
        delta_view = tl.make_tensor_descriptor(delta, [length, width_out], [stride, 1], [BLOCK_K, BLOCK_M])
        x_view = tl.make_tensor_descriptor(x, [length, width_in], [width_in, 1], [BLOCK_K, BLOCK_N])
        gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, length, BLOCK_K):
            delta_tile = delta_view.load([first, first_out])
            gradient = tl.dot(tl.trans(delta_tile), x_view.load([first, first_in]), gradient)
    else:
        gradient = product_of_pointers(
            delta, x, first_out, first_in, width_out, stride, width_in, length,
            PRECISION, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return gradient
