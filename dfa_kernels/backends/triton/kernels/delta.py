"""δ of every tap from one tile of the projection: P is made once for all taps and never leaves the registers."""

from __future__ import annotations

import triton
import triton.language as tl

from .feedback_tile import projection_tile
from .tiles import multiple, slope_product


@triton.jit
def write_deltas(
    tile, error, stored, saved, dropout_mask, deltas, sums, error_size, stride_row, stride_column, key0, key1, nonzeros,
    widest, rows, sizes, delta_strides, first_sums, channels, scales, p, q,
    SOURCE: tl.constexpr, DERIVATIVES: tl.constexpr, WHICH: tl.constexpr, SAVED: tl.constexpr, DROPOUT: tl.constexpr,
    SUMS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ENTRY: tl.constexpr, DOT: tl.constexpr,
    DELTA_PRECISION: tl.constexpr, ROUND: tl.constexpr, ALIGN: tl.constexpr, ALIGN_ERROR: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Writes δ at tile `tile` of the projection [widest units, rows] into every tap that reaches it.

    saved, dropout_mask and deltas of tap i are [rows, sizes[i]], deltas in rows of delta_strides[i]; in channels-last
    order [rows, sizes[i] / channels[i], channels[i]] for taps in CHANNELS_LAST. SAVED and DROPOUT tell which taps have
    the respective tensor. Of taps in SUMS, sums gets the sums of δ over the tile's rows, before δ is rounded to its
    dtype: [tiles of rows, sizes[i]] from tiles of rows · first_sums[i] on.
    """
    row_tiles = tl.cdiv(rows, BLOCK_R)
    first_unit = ((tile // row_tiles) * BLOCK_U).to(INDEX)
    unit = first_unit + tl.arange(0, BLOCK_U)
    row = ((tile % row_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)).to(INDEX)
    projection = projection_tile(
        error, stored, key0, key1, first_unit, unit, widest, row, rows, multiple(error_size, ALIGN_ERROR),
        multiple(stride_row, ALIGN_ERROR), stride_column, nonzeros, SOURCE, BLOCK_E, BITS, ENTRY, DOT, DELTA_PRECISION,
        ROUND,
    )  # fmt: skip
    for i in tl.static_range(len(sizes)):
        size = multiple(sizes[i], ALIGN)
        if first_unit < size:
            inside = (unit < size)[:, None] & (row < rows)[None, :]
            place = unit
            if (CHANNELS_LAST >> i) & 1:
                inner = size // channels[i]
                place = unit % inner * channels[i] + unit // inner
            at = row[None, :] * size + place[:, None]
            delta = projection * scales[i]
            if (SAVED >> i) & 1:
                value = tl.load(saved[i] + at, mask=inside, other=0.0).to(tl.float32)
                delta = slope_product(delta, value, p[i], q[i], WHICH[i], DERIVATIVES)
            if (DROPOUT >> i) & 1:
                delta *= tl.load(dropout_mask[i] + at, mask=inside, other=0.0).to(tl.float32)
            to = row[None, :] * multiple(delta_strides[i], ALIGN) + place[:, None]
            tl.store(deltas[i] + to, delta.to(deltas[i].dtype.element_ty), mask=inside)
            if (SUMS >> i) & 1:
                # Rows beyond the batch have an error of 0, of which every activation makes a δ of 0.
                first = row_tiles.to(INDEX) * first_sums[i] + (tile % row_tiles).to(INDEX) * size
                tl.store(sums + first + unit, tl.sum(delta, axis=1), mask=unit < size)


@triton.jit
def column_sums(matrix, rows, stride_row, column, columns, stride_column):
    """Σ over the rows of matrix [rows, columns] at `column` [M], in float32; 0 beyond the last column."""
    BLOCK: tl.constexpr = column.shape[0] // 4
    total = tl.zeros((column.shape[0],), tl.float32)
    for first in range(0, rows, BLOCK):
        row = (first + tl.arange(0, BLOCK)).to(column.dtype)
        at = row[:, None] * stride_row + column[None, :] * stride_column
        part = tl.load(matrix + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
        total += tl.sum(part.to(tl.float32), axis=0)
    return total


@triton.jit
def sum_over_tiles(sums, first_sum, out, width_out, span, row_tiles):
    """Σ δ over all rows and positions at outputs `out` [M], from its sums over tiles of rows."""
    total = tl.zeros((out.shape[0],), tl.float32)
    first = row_tiles.to(out.dtype) * first_sum
    for position in range(span):
        total += column_sums(sums + first + position * width_out, row_tiles, span * width_out, out, width_out, 1)
    return total
