"""Tiles of the feedback matrix U, from memory or made anew, and of the projection P = e Uᵀ.

SOURCE says where U comes from. "matrix", "signs", "sparse": what dense storage keeps. "gaussian", "uniform",
"rademacher", "sparse_seed": regenerated from the seed, the numbers of `dfa_kernels.feedback.entries`. "fastfood",
"fastfood_seed": a structured U in blocks of 2^BITS rows, from its diagonals or from the seed. "projection": P itself
lies in memory, made by `dfa_kernels.feedback.projection`.

Transposed throughout: units along the first axis, rows of the batch along the second, which is how the weight
gradient's product wants δ.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....feedback.entries import Stream
from .fastfood_tile import fastfood_product, fastfood_tile
from .random_tile import bit_signs, flat_words, normal_entries, once, row_words, sign_entries, uniform_entries, word_of
from .rounded import nearest_tf32

GAUSSIAN = tl.constexpr(int(Stream.GAUSSIAN))
UNIFORM = tl.constexpr(int(Stream.UNIFORM))
RADEMACHER = tl.constexpr(int(Stream.RADEMACHER))
SPARSE = tl.constexpr(int(Stream.SPARSE))


@triton.jit
def feedback_tile(
    stored, key0, key1, first_unit, unit, units, first_column, error_size, nonzeros,
    SOURCE: tl.constexpr, BLOCK_E: tl.constexpr, BITS: tl.constexpr, ENTRY: tl.constexpr, DOT: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """U[unit, first_column : first_column + BLOCK_E], rounded to ENTRY, as DOT [M, BLOCK_E].

    0 for unit >= units and for columns beyond the error. first_unit: the first of `unit`; the others that are below
    units follow it. For Fastfood a multiple of 2^BITS.

    ROUND: to the nearest tf32, which tensor cores would otherwise truncate to.
    """
    column = first_column + tl.arange(0, BLOCK_E)
    inside = (unit < units)[:, None] & (column < error_size)[None, :]
    if SOURCE == "matrix":
        tile = tl.load(stored[0] + unit[:, None] * error_size + column[None, :], mask=inside, other=0.0)
    elif SOURCE == "signs":
        tile = _packed_tile(stored[0], unit, units, column, first_column, error_size)
    elif SOURCE == "sparse" or SOURCE == "sparse_seed":
        tile = _sparse_tile(stored, key0, key1, unit, units, column, error_size, nonzeros, SOURCE)
    elif SOURCE == "rademacher":
        tile = _sign_tile(unit, column, first_column, key0, key1)
    elif SOURCE == "fastfood" or SOURCE == "fastfood_seed":
        component = (first_unit + tl.arange(0, unit.shape[0])) % (1 << BITS)
        identity = column[:, None] == component[None, :]
        product = fastfood_product(identity.to(tl.float32), stored, key0, key1, first_unit, units, SOURCE, BITS)
        tile = tl.trans(product)
    else:
        call = first_column // 4 + tl.arange(0, BLOCK_E // 4)
        if SOURCE == "gaussian":
            word0, word1, word2, word3 = row_words(unit, call, GAUSSIAN, key0, key1)
            tile = normal_entries(word0, word1, word2, word3)
        else:
            # Compiled for "projection" as well, though nothing runs it then.
            tl.static_assert(SOURCE == "uniform" or SOURCE == "projection")
            word0, word1, word2, word3 = row_words(unit, call, UNIFORM, key0, key1)
            tile = uniform_entries(word0, word1, word2, word3)
    # Entries are rounded to the feedback's own precision, whatever the product is computed in.
    tile = tl.where(inside, tile.to(ENTRY), 0.0)
    if ROUND:
        tile = nearest_tf32(tile.to(tl.float32))
    return tile.to(DOT)


@triton.jit
def _sign_tile(unit, column, first_column, key0, key1):
    """±1 [M, BLOCK_E] for columns that lie in one call of 128 signs."""
    tl.static_assert(column.shape[0] <= 128)
    word0, word1, word2, word3 = flat_words(unit, first_column // 128, RADEMACHER, key0, key1)
    if column.shape[0] > 32:
        return sign_entries(
            once(word0)[:, None], once(word1)[:, None], once(word2)[:, None], once(word3)[:, None], column
        )
    return bit_signs(once(word_of(first_column, word0, word1, word2, word3))[:, None], column)


@triton.jit
def _packed_tile(words, unit, units, column, first_column, error_size):
    """±1 [M, BLOCK_E] from rows of 32 signs a word: a word is read once, not once a sign."""
    tl.static_assert(column.shape[0] <= 128)
    COUNT: tl.constexpr = (column.shape[0] + 31) // 32
    length = tl.cdiv(error_size, 32)
    first = words + unit * length + first_column // 32
    left = tl.where(unit < units, length - first_column // 32, 0)
    word0 = _packed_word(first, left, 0)
    if COUNT == 1:
        return bit_signs(word0, column)
    word1 = _packed_word(first, left, 1)
    if COUNT == 2:
        return sign_entries(word0, word1, word0, word1, column)
    return sign_entries(word0, word1, _packed_word(first, left, 2), _packed_word(first, left, 3), column)


@triton.jit
def _packed_word(first, left, number: tl.constexpr):
    """Word `number` of every row: uint32 [M, 1]; 0 where fewer are left."""
    word = tl.load(first + number, mask=number < left, other=0)
    return once(word)[:, None].to(tl.uint32, bitcast=True)


@triton.jit
def _sparse_tile(stored, key0, key1, unit, units, column, error_size, nonzeros, SOURCE: tl.constexpr):
    tile = tl.zeros((unit.shape[0], column.shape[0]), tl.float32)
    offset = _sparse_offset(unit, error_size, key0, key1, SOURCE)
    for j in range(nonzeros):
        index, sign = sparse_entry(stored, key0, key1, unit, units, offset, j, error_size, nonzeros, SOURCE)
        tile += tl.where(index[:, None] == column[None, :], sign[:, None], 0.0)
    return tile


@triton.jit
def sparse_entry(stored, key0, key1, unit, units, offset, j, error_size, nonzeros, SOURCE: tl.constexpr):
    """Column (int32) and sign (float32) of entry j of every row, each [M]."""
    if SOURCE == "sparse":
        at = unit * nonzeros + j
        index = tl.load(stored[0] + at, mask=unit < units, other=0)
        sign = tl.load(stored[1] + at, mask=unit < units, other=0)
        return index, sign.to(tl.float32)
    word0, word1, word2, word3 = flat_words(unit, 1 + j // 2, SPARSE, key0, key1)
    odd = j % 2 == 1
    position, sign = tl.where(odd, word2, word0), tl.where(odd, word3, word1)
    wide = error_size.to(tl.int64)
    first = j * wide // nonzeros
    width = (j + 1) * wide // nonzeros - first
    within = tl.umulhi(position, tl.broadcast_to(width.to(tl.uint32), unit.shape))
    index = (offset.to(tl.int64) + first + within.to(tl.int64)) % wide
    both = once(index.to(tl.int32) << 1 | (sign & 1).to(tl.int32))
    return both >> 1, tl.where(both & 1 == 1, 1.0, -1.0)


@triton.jit
def _sparse_offset(unit, error_size, key0, key1, SOURCE: tl.constexpr):
    """The rotation of every row's strata, [M]."""
    if SOURCE == "sparse":
        offset = unit
    else:
        word0, _, _, _ = flat_words(unit, 0, SPARSE, key0, key1)
        offset = tl.umulhi(word0, tl.broadcast_to(error_size.to(tl.uint32), unit.shape))
    return offset


@triton.jit
def error_tile(error, row, rows, stride_row, column, error_size, stride_column):
    """eᵀ at columns [E] and rows [R], [E, R]; 0 outside."""
    at = row[None, :] * stride_row + column[:, None] * stride_column
    return tl.load(error + at, mask=(column < error_size)[:, None] & (row < rows)[None, :], other=0.0)


@triton.jit
def projection_tile(
    error, stored, key0, key1, first_unit, unit, units, row, rows, error_size, stride_row, stride_column, nonzeros,
    SOURCE: tl.constexpr, BLOCK_E: tl.constexpr, BITS: tl.constexpr, ENTRY: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """(e Uᵀ)ᵀ at units [M], first_unit and those that follow, and rows [R]: float32 [M, R], not scaled."""
    if SOURCE == "projection":
        at = row[None, :] * units + unit[:, None]
        return tl.load(stored[0] + at, mask=(unit < units)[:, None] & (row < rows)[None, :], other=0.0)
    if SOURCE == "fastfood" or SOURCE == "fastfood_seed":
        product = fastfood_tile(
            error, stored, key0, key1, first_unit, units, row, rows, error_size, stride_row, stride_column, SOURCE,
            unit.shape[0], BITS,
        )  # fmt: skip
        return tl.trans(product)
    projection = tl.zeros((unit.shape[0], row.shape[0]), tl.float32)
    if SOURCE == "sparse" or SOURCE == "sparse_seed":
        offset = _sparse_offset(unit, error_size, key0, key1, SOURCE)
        for j in range(nonzeros):
            index, sign = sparse_entry(stored, key0, key1, unit, units, offset, j, error_size, nonzeros, SOURCE)
            picked = error_tile(error, row, rows, stride_row, index.to(row.dtype), error_size, stride_column)
            projection += picked.to(tl.float32) * sign[:, None]
        return projection
    for first in range(0, error_size, BLOCK_E):
        tile = feedback_tile(
            stored, key0, key1, first_unit, unit, units, first, error_size, nonzeros, SOURCE, BLOCK_E, BITS, ENTRY, DOT,
            ROUND,
        )  # fmt: skip
        column = (first + tl.arange(0, BLOCK_E)).to(row.dtype)
        e = error_tile(error, row, rows, stride_row, column, error_size, stride_column)
        projection = tl.dot(tile, e.to(DOT), projection, input_precision=PRECISION)
    return projection
