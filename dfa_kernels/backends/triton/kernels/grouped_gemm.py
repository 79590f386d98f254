"""The weight gradients of all layers of a wide network in one launch of persistent programs, from δ in memory.

Each program has every so many tiles of the gradients of all layers, so that none begins a layer or ends one alone. What
becomes of a finished tile is the epilogue's matter: no gradient is written that an update can spend.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta import sum_over_tiles
from .epilogue import finish_layer
from .product import product_of_pointers, product_of_views
from .tiles import locate, multiple, pick, pick_flag


@triton.jit(do_not_specialize=["rows", "delta_width", "delta_stride", "parts", "first_error_sum", "total"])
def grouped_gemm(
    delta, output_delta, inputs, x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15, sums, weights,
    biases, weight_state0, weight_state1, bias_state0, bias_state1, rows, widths_in, widths_out, positions,
    first_deltas, first_sums, delta_width, delta_stride, parts, first_error_sum, total, hyper,
    OUTPUT: tl.constexpr, WEIGHTS: tl.constexpr, BIASES: tl.constexpr, RULE: tl.constexpr, WEIGHT_SETS: tl.constexpr,
    BIAS_SETS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, INDEX: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Gradients of all layers, or their updates, from what `deltas` has left behind.

    If TMA, the copy engine brings the tiles: delta [layers, rows, widest] and output_delta [1, rows, delta_width] are
    descriptors then, and so are x0, x1, ... of the layers' inputs: launchers of Triton 3.6 and 3.7 take none in tuples.
    Otherwise delta is δ of layer i from rows · first_deltas[i] on, output_delta that of the output layer in rows of
    delta_stride, and inputs are tensors. sums: `parts` sums of each unit.
    """
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        layer, m, n = locate(tile, widths_in, widths_out, BLOCK_M, BLOCK_N, GROUP_M, WEIGHTS, BIASES)
        is_output = OUTPUT and layer == len(widths_in) - 1
        width_in = multiple(pick(widths_in, layer), ALIGN)
        width_out, span = pick(widths_out, layer), pick(positions, layer)
        if TMA:
            x = x0
            views = (x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
            for i in tl.static_range(1, len(widths_in)):
                if layer == i:
                    x = views[i]
            delta_view = delta
            if is_output:
                delta_view = output_delta
            gradient = product_of_views(
                delta_view, x, tl.where(is_output, 0, layer), m * BLOCK_M, n * BLOCK_N, rows, BLOCK_M, BLOCK_N, BLOCK_K
            )  # fmt: skip
        else:
            own = delta + rows.to(INDEX) * multiple(pick(first_deltas, layer), ALIGN)
            gradient = product_of_pointers(
                tl.where(is_output, output_delta, own), pick(inputs, layer), m * BLOCK_M, n * BLOCK_N,
                multiple(tl.where(is_output, delta_width, width_out), ALIGN),
                multiple(tl.where(is_output, delta_stride, width_out), ALIGN), width_in, rows * span,
                PRECISION, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        out = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
        bias_gradient = tl.zeros((BLOCK_M,), tl.float32)
        if BIASES and n == 0:
            first_sum = tl.where(is_output, first_error_sum, pick(first_sums, layer))
            summed = tl.where(pick_flag(BIASES, layer), parts, 0)
            bias_gradient = sum_over_tiles(sums, first_sum, out, width_out, span, summed)
        finish_layer(
            gradient, bias_gradient, layer, out, n * BLOCK_N, width_in, width_out, n == 0, weights, biases,
            weight_state0, weight_state1, bias_state0, bias_state1, hyper,
            WEIGHTS, BIASES, RULE, WEIGHT_SETS, BIAS_SETS,
        )  # fmt: skip
