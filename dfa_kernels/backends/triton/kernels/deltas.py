"""δ of every hidden layer of a wide network, written once, and the sums of δ over the batch that biases need.

Where P costs little, a program has a strip of units of a few layers and walks over a part of the batch: P of a tile is
made in the registers, δ of all its layers from it, and the sums stay in the registers until the walk is over. So there
is one sum for every part of the batch, of which there are as few as still fill the GPU; `grouped_gemm` adds them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .delta import write_deltas
from .feedback_tile import error_tile, feedback_tile
from .tiles import multiple, pick, pick_flag, slope_product

# Adjacent units that a thread loads at once, and has the columns of U of in its registers: twice as many would leave
# those for half as many threads.
UNITS = tl.constexpr(4)
# Columns and rows of the error that a program sums, and copies, at a time.
OUTPUT_UNITS = tl.constexpr(64)
OUTPUT_ROWS = tl.constexpr(32)


@triton.jit(
    do_not_specialize=[
        "error_size", "stride_row", "key0", "key1", "nonzeros", "widest", "rows", "parts", "part_rows", "columns",
        "delta_width", "first_error_sum",
    ]
)  # fmt: skip
def deltas(
    error, stored, saved, dropout_mask, delta, error_copy, sums, error_size, stride_row, stride_column, key0, key1,
    nonzeros, widest, rows, sizes, first_deltas, delta_strides, first_sums, scales, p, q, parts, part_rows, columns,
    delta_width, first_error_sum,
    SOURCE: tl.constexpr, DERIVATIVES: tl.constexpr, WHICH: tl.constexpr, DROPOUT: tl.constexpr, BIASES: tl.constexpr,
    ENTRY: tl.constexpr, DOT: tl.constexpr, DELTA_PRECISION: tl.constexpr, ROUND: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_ERROR: tl.constexpr, INDEX: tl.constexpr, COPY: tl.constexpr, SUM_ERROR: tl.constexpr, WALK: tl.constexpr,
    HELD: tl.constexpr, GROUPS: tl.constexpr, LAYERS: tl.constexpr, ALIKE: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """δ = (e Bᵀ) ⊙ f' of every hidden layer (paper, eq. 3).

    delta: δ of layer i from rows · first_deltas[i] on, in rows of delta_strides[i]. sums: Σ δ over each of the `parts`
    parts of the batch, part_rows rows each (a multiple of BLOCK_R): [parts, sizes[i]] from parts · first_sums[i] on,
    for layers in BIASES. Columns of the error are summed as well, if SUM_ERROR, from parts · first_error_sum on, and
    copied, if COPY, to error_copy [rows, delta_width], with zeros behind the last. `columns` programs share a part.

    If WALK, GROUPS groups of LAYERS layers are programs of their own; HELD are the error's components, each with its
    column of U in the registers, or 0 if P is given. ALIKE: every layer has `widest` units, every group LAYERS layers.
    Otherwise as for `write_deltas`, a tile of rows for each part.
    """
    # Neighbours have neighbouring units of the same rows.
    part, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    first_row = part * part_rows
    end_row = tl.minimum(first_row + part_rows, rows)
    output_strips = tl.cdiv(delta_width, OUTPUT_UNITS) if COPY or SUM_ERROR else 0
    if (COPY or SUM_ERROR) and column < output_strips:
        _output_delta(
            column, part, first_row, end_row, error, error_copy, sums, error_size, stride_row, stride_column,
            delta_width, parts, first_error_sum, COPY, SUM_ERROR, INDEX,
        )  # fmt: skip
    elif WALK:
        strip = (column - output_strips) // GROUPS
        first_layer = (column - output_strips) % GROUPS * LAYERS
        _walk(
            strip, first_layer, part, first_row, end_row, error, stored, saved, dropout_mask, delta, sums,
            multiple(error_size, ALIGN_ERROR), multiple(stride_row, ALIGN_ERROR), stride_column, key0, key1, nonzeros,
            multiple(widest, ALIGN), rows, sizes, first_deltas, delta_strides, first_sums, scales, p, q, parts,
            SOURCE, DERIVATIVES, WHICH, DROPOUT, BIASES, ENTRY, ALIGN, INDEX, HELD, LAYERS, ALIKE, BLOCK_U, BLOCK_R,
            BLOCK_E, BITS,
        )  # fmt: skip
    else:
        outs = tl.tuple(())
        for i in tl.static_range(len(sizes)):
            outs += (delta + rows.to(INDEX) * multiple(first_deltas[i], ALIGN),)
        write_deltas(
            (column - output_strips) * parts + part, error, stored, saved, dropout_mask, outs, sums, error_size,
            stride_row, stride_column, key0, key1, nonzeros, widest, rows, sizes, delta_strides, first_sums, sizes,
            scales, p, q,
            SOURCE, DERIVATIVES, WHICH, (1 << len(sizes)) - 1, DROPOUT, BIASES, 0, ENTRY, DOT, DELTA_PRECISION, ROUND,
            ALIGN, ALIGN_ERROR, INDEX, BLOCK_U, BLOCK_R, BLOCK_E, BITS,
        )  # fmt: skip


@triton.jit
def _walk(
    strip, first_layer, part, first_row, end_row, error, stored, saved, dropout_mask, delta, sums, error_size,
    stride_row, stride_column, key0, key1, nonzeros, widest, rows, sizes, first_deltas, delta_strides, first_sums,
    scales, p, q, parts,
    SOURCE: tl.constexpr, DERIVATIVES: tl.constexpr, WHICH: tl.constexpr, DROPOUT: tl.constexpr, BIASES: tl.constexpr,
    ENTRY: tl.constexpr, ALIGN: tl.constexpr, INDEX: tl.constexpr, HELD: tl.constexpr, LAYERS: tl.constexpr,
    ALIKE: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """δ of units of `strip`, of LAYERS layers from first_layer on, in rows first_row … end_row."""
    first_unit = (strip * BLOCK_U).to(INDEX)
    unit = first_unit + tl.arange(0, BLOCK_U)
    columns = tl.tuple(())
    for first in tl.static_range(0, HELD, BLOCK_E):
        U = feedback_tile(
            stored, key0, key1, first_unit, unit, widest, first, error_size, nonzeros, SOURCE, BLOCK_E, BITS, ENTRY,
            tl.float32, False,
        )  # fmt: skip
        for k in tl.static_range(BLOCK_E):
            column = tl.sum(tl.where(tl.arange(0, BLOCK_E)[None, :] == k, U, 0.0), axis=1)
            # Gathered from where they are: the compiler would else keep to the registers in which it finds them, and
            # bring all that is loaded and stored there and back.
            columns += (tl.gather(column, tl.arange(0, BLOCK_U), 0),)
    totals = tl.tuple(())
    for _ in tl.static_range(LAYERS):
        totals += (tl.zeros((BLOCK_U, BLOCK_R // 2), tl.float32),)
    for first in range(first_row, end_row, BLOCK_R):
        row = (first + tl.arange(0, BLOCK_R)).to(INDEX)
        if HELD:
            # No product of tiles: its result lies in the registers otherwise than what is loaded.
            projection = tl.zeros((BLOCK_U, BLOCK_R), tl.float32)
            for k in tl.static_range(HELD):
                e = tl.load(error + row * stride_row + k * stride_column, mask=row < rows, other=0.0)
                projection += columns[k][:, None] * e.to(tl.float32)[None, :]
        else:
            given = row[None, :] * widest + unit[:, None]
            projection = tl.load(stored[0] + given, mask=(unit < widest)[:, None] & (row < rows)[None, :], other=0.0)
        # All that this step needs is on its way before the first number of it is used.
        values = tl.tuple(())
        masks = tl.tuple(())
        for i in tl.static_range(LAYERS):
            layer = first_layer + i
            at, inside = _places(layer, unit, row, rows, sizes, sizes, widest, ALIGN, ALIKE)
            value = tl.load(pick(saved, layer) + at, mask=inside, other=0.0)
            mask = value
            if DROPOUT:
                noisy = inside & pick_flag(DROPOUT, layer)
                mask = tl.load(pick(dropout_mask, layer) + at, mask=noisy, other=1.0)
            values += (value,)
            masks += (mask,)
        before = totals
        totals = tl.tuple(())
        for i in tl.static_range(LAYERS):
            layer = first_layer + i
            slope = slope_product(
                projection * pick(scales, layer), values[i].to(tl.float32), pick(p, layer), pick(q, layer),
                pick(WHICH, layer), DERIVATIVES,
            )  # fmt: skip
            if DROPOUT:
                slope *= masks[i].to(tl.float32)
            own = delta + rows.to(INDEX) * multiple(pick(first_deltas, layer), ALIGN)
            at, inside = _places(layer, unit, row, rows, sizes, delta_strides, widest, ALIGN, ALIKE)
            tl.store(own + at, slope.to(delta.dtype.element_ty), mask=inside)
            # Rows beyond the batch have an error of 0, of which every activation makes a δ of 0.
            # A thread has rows half a tile apart: added up first, they take half the registers.
            halves = tl.reshape(slope, (BLOCK_U, 2, BLOCK_R // 2))
            totals += (before[i] + tl.sum(halves, axis=1),)
    if BIASES:
        for i in tl.static_range(LAYERS):
            layer = first_layer + i
            size = _size_of(layer, sizes, ALIGN)
            first_sum = parts.to(INDEX) * pick(first_sums, layer) + part.to(INDEX) * size
            wanted = unit < tl.where(pick_flag(BIASES, layer), size, 0)
            tl.store(sums + first_sum + unit, tl.sum(totals[i], axis=1), mask=wanted)


@triton.jit
def _size_of(layer, sizes, ALIGN: tl.constexpr):
    """Units of a layer; none of a layer behind the last, which a group that is not full has."""
    return multiple(tl.where(layer < len(sizes), pick(sizes, layer), 0), ALIGN)


@triton.jit
def _places(layer, unit, row, rows, sizes, strides, widest, ALIGN: tl.constexpr, ALIKE: tl.constexpr):
    """Where layer's numbers at `unit` of `row` are, in rows of its stride, and which of them it has."""
    size, stride = _size_of(layer, sizes, ALIGN), multiple(pick(strides, layer), ALIGN)
    if ALIKE:
        # Places of each of four layers would take 16 registers more.
        size, stride = widest, widest
    inside = (unit < size)[:, None] & (row < rows)[None, :]
    return tl.max_contiguous(row[None, :] * stride + unit[:, None], (UNITS, 1)), inside


@triton.jit
def _output_delta(
    strip, part, first_row, end_row, error, error_copy, sums, error_size, stride_row, stride_column, width, parts,
    first_sum,
    COPY: tl.constexpr, SUM_ERROR: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Columns of the error: their sums, if SUM_ERROR, and they themselves in error_copy's dtype, if COPY."""
    column = (strip * OUTPUT_UNITS + tl.arange(0, OUTPUT_UNITS)).to(INDEX)
    total = tl.zeros((OUTPUT_UNITS, OUTPUT_ROWS), tl.float32)
    for first in range(first_row, end_row, OUTPUT_ROWS):
        row = (first + tl.arange(0, OUTPUT_ROWS)).to(INDEX)
        e = error_tile(error, row, end_row, stride_row, column, error_size, stride_column)
        total += e.to(tl.float32)
        if COPY:
            inside = (column < width)[:, None] & (row < end_row)[None, :]
            at = row[None, :] * width + column[:, None]
            tl.store(error_copy + at, e.to(error_copy.dtype.element_ty), mask=inside)
    if SUM_ERROR:
        first_of_part = parts.to(INDEX) * first_sum + part.to(INDEX) * error_size
        tl.store(sums + first_of_part + column, tl.sum(total, axis=1), mask=column < error_size)
