"""The grouped launch for small networks: a program makes δ of its outputs once and goes along the layer's inputs.

A program has a strip of one layer's weight gradient: BLOCK_M outputs, and a run of the tiles of BLOCK_N inputs. It
makes δ of its outputs for the whole batch, which then stays where the product reads it, and each tile is one product as
deep as the batch: no program waits for another, and δ never travels through memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import finish, parameter_before, spend, velocity_before
from .feedback_tile import error_tile, feedback_tile, projection_tile
from .rounded import nearest_tf32
from .tiles import multiple, pick, pick_flag, slope_product


@triton.jit(
    do_not_specialize=[
        "error_size", "stride_row", "key0", "key1", "nonzeros", "widest", "rows",
    ]
)  # fmt: skip
def strip(
    error, stored, inputs, saved, dropout_mask, weights, biases, weight_state0, weight_state1, bias_state0, bias_state1,
    error_size, stride_row, stride_column, key0, key1, nonzeros, widest, rows, widths_in, widths_out, positions,
    firsts, chunks, scales, p, q, hyper,
    SOURCE: tl.constexpr, OUTPUT: tl.constexpr, DERIVATIVES: tl.constexpr, WHICH: tl.constexpr, DROPOUT: tl.constexpr,
    WEIGHTS: tl.constexpr, BIASES: tl.constexpr, RULE: tl.constexpr, WEIGHT_SETS: tl.constexpr,
    BIAS_SETS: tl.constexpr, ENTRY: tl.constexpr, DOT: tl.constexpr, DELTA_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr, ROUND: tl.constexpr, ALIGN: tl.constexpr, ALIGN_ERROR: tl.constexpr,
    INDEX: tl.constexpr, SWAP: tl.constexpr, HELD: tl.constexpr, POSITIONS: tl.constexpr, PARTS: tl.constexpr,
    EVEN: tl.constexpr, INPUTS_AHEAD: tl.constexpr, PARAMETERS_AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Gradients of all layers, or their updates (paper, eq. 3).

    error [rows, error_size]; of layer i: inputs [rows · positions, widths_in], saved and dropout_mask
    [rows · positions, widths_out]. If OUTPUT, the last layer's δ is the error. weights and biases are where results go.
    Layer i's programs are those from firsts[i] on, chunks[i] of them for each tile of outputs.

    δ is in POSITIONS · PARTS parts of BLOCK_R rows. SWAP: products are (xᵀ δ) [BLOCK_N, BLOCK_M], not (δᵀ x). HELD: a
    tile of U has all components of the error. EVEN: no part goes beyond the rows. PARAMETERS_AHEAD: a parameter's tile
    is read while the one before is multiplied; INPUTS_AHEAD, for one part that is EVEN and no SWAP: a tile of x.
    """
    error_size, stride_row = multiple(error_size, ALIGN_ERROR), multiple(stride_row, ALIGN_ERROR)
    layer, m, chunk, first_tile, end_tile = _strip_of(
        tl.program_id(0), widths_in, widths_out, firsts, chunks, BLOCK_M, BLOCK_N, WEIGHTS
    )
    width_in, width_out = multiple(pick(widths_in, layer), ALIGN), pick(widths_out, layer)
    span = 1 if POSITIONS == 1 else pick(positions, layer)
    x, is_output = pick(inputs, layer), OUTPUT and layer == len(widths_in) - 1
    out = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
    # Of the tile after the strip's last nothing is read.
    end_column = tl.minimum(end_tile * BLOCK_N, width_in)
    if INPUTS_AHEAD:
        # Before δ is made, so that it arrives meanwhile.
        x_following = _whole_tile(x, first_tile, width_in, end_column, INDEX, BLOCK_R, BLOCK_N)

    deltas = ()
    bias_gradient = tl.zeros((BLOCK_M,), tl.float32)
    for position in tl.static_range(POSITIONS):
        for part in tl.static_range(PARTS):
            row = (part * BLOCK_R + tl.arange(0, BLOCK_R)).to(INDEX)
            # A layer of fewer positions has no rows there.
            end = tl.where(position < span, rows, 0)
            if is_output:
                delta = error_tile(error, row, end, stride_row, out, error_size, stride_column).to(tl.float32)
            else:
                delta = _hidden_delta(
                    error, stored, pick(saved, layer), dropout_mask, layer, m * BLOCK_M, out, row, end, position, span,
                    multiple(tl.where(is_output, 0, width_out), ALIGN), error_size, stride_row, stride_column,
                    key0, key1, nonzeros, widest, pick(scales, layer), pick(p, layer), pick(q, layer),
                    pick(WHICH, layer), SOURCE, DERIVATIVES, DROPOUT, ENTRY, DOT, DELTA_PRECISION, ROUND, ALIGN, HELD,
                    EVEN, BLOCK_E, BITS,
                )  # fmt: skip
            if BIASES and chunk == 0:
                bias_gradient += tl.sum(delta, axis=1)
            deltas = deltas + _factors(
                tl.trans(delta) if SWAP else delta, x.dtype.element_ty, PRECISION, POSITIONS * PARTS
            )

    if BIASES and chunk == 0:
        finish(
            bias_gradient, out, out < tl.where(pick_flag(BIASES, layer), width_out, 0), pick(biases, layer),
            pick(bias_state0, layer), pick(bias_state1, layer), hyper, pick(BIAS_SETS, layer), RULE,
        )  # fmt: skip
    if WEIGHTS:
        weight, state0, state1 = pick(weights, layer), pick(weight_state0, layer), pick(weight_state1, layer)
        if PARAMETERS_AHEAD:
            _, at, inside = _tile_of(first_tile, out, width_in, width_out, end_column, SWAP, BLOCK_N)
            following = parameter_before(x, at, inside, weight, RULE)
        for n in range(first_tile, end_tile):
            column, at, inside = _tile_of(n, out, width_in, width_out, end_column, SWAP, BLOCK_N)
            # Before the product, so that they arrive during it.
            if PARAMETERS_AHEAD:
                before = following
                _, next_at, next_inside = _tile_of(n + 1, out, width_in, width_out, end_column, SWAP, BLOCK_N)
                following = parameter_before(x, next_at, next_inside, weight, RULE)
            else:
                before = parameter_before(x, at, inside, weight, RULE)
            early = velocity_before(x, at, inside, state0, hyper, pick(WEIGHT_SETS, layer), RULE)
            if INPUTS_AHEAD:
                x_tile = x_following
                x_following = _whole_tile(x, n + 1, width_in, end_column, INDEX, BLOCK_R, BLOCK_N)
                gradient = _add_part(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_tile, deltas, 0, PRECISION, False, 1)
            else:
                gradient = _product(
                    x, deltas, column, width_in, rows, span, PRECISION, SWAP, POSITIONS, PARTS, EVEN, BLOCK_R
                )
            spend(gradient, before, early, at, inside, weight, state0, state1, hyper, pick(WEIGHT_SETS, layer), RULE)


@triton.jit
def _tile_of(n, out, width_in, width_out, end_column, SWAP: tl.constexpr, BLOCK_N: tl.constexpr):
    """(inputs [N] of a strip's tile n, their weights' places, whether they are the strip's), both [M, N], or [N, M]."""
    column = (n * BLOCK_N + tl.arange(0, BLOCK_N)).to(out.dtype)
    at = out[:, None] * width_in + column[None, :]
    inside = (out < width_out)[:, None] & (column < end_column)[None, :]
    if SWAP:
        at, inside = tl.trans(at), tl.trans(inside)
    return column, at, inside


@triton.jit
def _strip_of(
    program, widths_in, widths_out, firsts, chunks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHTS: tl.constexpr
):
    """(layer, tile along its outputs, chunk, first and end of the chunk's tiles along its inputs) of a program."""
    layer = program * 0
    for i in tl.static_range(1, len(firsts)):
        layer = tl.where(program >= firsts[i], i, layer)
    within = program - pick(firsts, layer)
    tiles_m = tl.cdiv(pick(widths_out, layer), BLOCK_M)
    tiles_n = tl.where(pick_flag(WEIGHTS, layer), tl.cdiv(pick(widths_in, layer), BLOCK_N), 0)
    chunk, count = within // tiles_m, pick(chunks, layer)
    return layer, within - chunk * tiles_m, chunk, chunk * tiles_n // count, (chunk + 1) * tiles_n // count


@triton.jit
def _hidden_delta(
    error, stored, saved, dropout_mask, layer, first_out, out, row, end, position, span, width_out, error_size,
    stride_row, stride_column, key0, key1, nonzeros, widest, scale, p, q, which,
    SOURCE: tl.constexpr, DERIVATIVES: tl.constexpr, DROPOUT: tl.constexpr, ENTRY: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, ROUND: tl.constexpr, ALIGN: tl.constexpr, HELD: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_E: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """δ of a hidden layer at outputs `out` [M] and rows [R] of a position: float32 [M, R], 0 for rows from `end` on."""
    at = (row * span + position)[None, :] * width_out + out[:, None]
    inside = (out < width_out)[:, None]
    if not EVEN:
        inside = inside & (row < end)[None, :]
    # Before the projection, so that it arrives meanwhile.
    value = tl.load(saved + at, mask=inside, other=0.0)
    # Units of a position follow those of the one before.
    first_unit = first_out + position * width_out
    unit = (first_unit + tl.arange(0, out.shape[0])).to(out.dtype)
    if HELD:
        U = feedback_tile(
            stored, key0, key1, first_unit, unit, widest, 0, error_size, nonzeros, SOURCE, BLOCK_E, BITS, ENTRY, DOT,
            ROUND,
        )  # fmt: skip
        component = tl.arange(0, BLOCK_E).to(row.dtype)
        e = error_tile(error, row, end, stride_row, component, error_size, stride_column).to(DOT)
        projection = tl.dot(U, nearest_tf32(e) if ROUND else e, input_precision=PRECISION)
    else:
        projection = projection_tile(
            error, stored, key0, key1, first_unit, unit, widest, row, end, error_size, stride_row, stride_column,
            nonzeros, SOURCE, BLOCK_E, BITS, ENTRY, DOT, PRECISION, ROUND,
        )  # fmt: skip
    delta = slope_product(projection * scale, value.to(tl.float32), p, q, which, DERIVATIVES)
    if DROPOUT:
        # Of a layer without a mask none is read.
        noisy = inside & (out < multiple(tl.where(pick_flag(DROPOUT, layer), width_out, 0), ALIGN))[:, None]
        delta *= tl.load(pick(dropout_mask, layer) + at, mask=noisy, other=1.0).to(tl.float32)
    return delta


@triton.jit
def _factors(tile, DTYPE: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr):
    """A tile as factors of products: rounded to the tf32 that tensor cores would else truncate it to, or, of float32 in
    full, three of bfloat16 that add up to it, where δ is one part: three of each of several have no room.
    """
    if PRECISION == "bf16x6" and PARTS == 1:
        high = tile.to(tl.bfloat16)
        rest = tile - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        factors = (high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16))
    elif PRECISION == "tf32" and DTYPE.is_fp32():
        factors = (nearest_tf32(tile.to(tl.float32)),)  # type: ignore[assignment]
    else:
        factors = (tile.to(DTYPE),)  # type: ignore[assignment]
    return factors


@triton.jit
def _product(
    x, deltas, column, width_in, rows, span,
    PRECISION: tl.constexpr, SWAP: tl.constexpr, POSITIONS: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of the weight gradient at inputs `column` [N], over all rows and positions: float32 [M, N], or [N, M]."""
    M: tl.constexpr = deltas[0].shape[1 if SWAP else 0]
    N: tl.constexpr = column.shape[0]
    gradient = tl.zeros((N, M) if SWAP else (M, N), tl.float32)
    row = tl.arange(0, BLOCK_R).to(column.dtype)
    # The same for all parts, which differ in where they begin: offsets of each would not fit into the registers.
    at = (row * span)[:, None] * width_in + column[None, :]
    for position in tl.static_range(POSITIONS):
        for part in tl.static_range(PARTS):
            first = x + (part * BLOCK_R * span + position) * width_in.to(column.dtype)
            end = tl.where(position < span, rows - part * BLOCK_R, 0)
            x_tile = _input_tile(first + at, row, end, column, width_in, EVEN)
            gradient = _add_part(gradient, x_tile, deltas, position * PARTS + part, PRECISION, SWAP, POSITIONS * PARTS)
    return gradient


@triton.jit
def _whole_tile(
    x, n, width_in, end_column, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Tile n of x [R, N], of which BLOCK_R rows are all, 0 from end_column on."""
    row, column = tl.arange(0, BLOCK_R).to(INDEX), (n * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    return _input_tile(x + row[:, None] * width_in + column[None, :], row, 0, column, end_column, True)


@triton.jit
def _input_tile(pointers, row, end, column, end_column, EVEN: tl.constexpr):
    """What `pointers` [R, N] point to, and 0 from row `end` and from end_column on."""
    inside = (column < end_column)[None, :]
    if not EVEN:
        inside = inside & (row < end)[:, None]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _add_part(
    gradient, x_tile, deltas,
    PART: tl.constexpr, PRECISION: tl.constexpr, SWAP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The gradient, with the product of a tile of x [R, N] and the part of δ of its rows."""
    xs = _factors(tl.trans(x_tile) if SWAP else x_tile, x_tile.dtype, PRECISION, PARTS)
    if PRECISION == "bf16x6" and PARTS == 1:
        gradient += _split_product(deltas, xs)
    elif SWAP:
        gradient = tl.dot(xs[0], deltas[PART], gradient, input_precision=PRECISION)
    else:
        gradient = tl.dot(deltas[PART], xs[0], gradient, input_precision=PRECISION)
    return gradient


@triton.jit
def _split_product(deltas, xs):
    """The product of δ [M, R] and x [R, N] by those of their three factors each that count, from the smallest on.

    As Triton makes it with "bf16x6", which would split δ anew for each tile of x. What is left of a number that is not
    finite is none, and gives way to the largest product.
    """
    product = tl.dot(deltas[1], xs[1])
    product = tl.dot(deltas[2], xs[0], product)
    product = tl.dot(deltas[0], xs[2], product)
    product = tl.dot(deltas[1], xs[0], product)
    product = tl.dot(deltas[0], xs[1], product)
    return tl.dot(deltas[0], xs[0], tl.where(product == product, product, 0.0))
