"""The fast Walsh–Hadamard transform: of tiles that lie in registers, and a kernel of a few rows for each program."""

from __future__ import annotations

import triton
import triton.language as tl

# A tile of so many numbers a row goes through shared memory at once, in float32: as large as every GPU has room for.
MOST_BITS_AT_ONCE = tl.constexpr(14)


@triton.jit
def hadamard_tile(x, BITS: tl.constexpr):
    """H x of every 2^BITS neighbours along the last axis of x [R, N], in Sylvester's order, not scaled."""
    if BITS > MOST_BITS_AT_ONCE:
        R: tl.constexpr = x.shape[0]
        N: tl.constexpr = x.shape[1]
        halves = tl.reshape(x, (R, N >> BITS, 2, 1 << (BITS - 1)))
        left, right = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        left = _rotations(tl.reshape(left, (R, N // 2)), BITS - 1)
        right = _rotations(tl.reshape(right, (R, N // 2)), BITS - 1)
        both = tl.reshape(tl.join(left + right, left - right), (R, N >> BITS, 1 << (BITS - 1), 2))
        return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (R, N))
    return _rotations(x, BITS)


@triton.jit
def _rotations(x, BITS: tl.constexpr):
    """A butterfly of neighbours a bit, whose sum and difference go to the halves of the result.

    So the lowest bit of the index becomes the highest, and after all bits everything is in its place. With each pair's
    distance growing instead, the compiler moves data between threads for nearly every bit, and here for every fifth:
    those that lie in one thread come after each other.
    """
    R: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    for _ in tl.static_range(BITS):
        left, right = tl.split(tl.reshape(x, (R, N >> BITS, (1 << BITS) // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(left + right, left - right), (0, 1, 3, 2)), (R, N))
    return x


@triton.jit(do_not_specialize=["rows", "scale"])
def hadamard_kernel(x, out, rows, n, scale, BLOCK: tl.constexpr, BITS: tl.constexpr, AHEAD: tl.constexpr):
    """Rows of n <= 2^BITS numbers, filled up with zeros; the first n of the result are saved.

    A program has BLOCK rows. AHEAD: it has as many again, one block after the other, as there are programs too few, and
    loads the next block while it transforms one.
    """
    if AHEAD:
        for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0), num_stages=2):
            _transform(block, x, out, rows, n, scale, BLOCK, BITS)
    else:
        _transform(tl.program_id(0), x, out, rows, n, scale, BLOCK, BITS)


@triton.jit
def _transform(block, x, out, rows, n, scale, BLOCK: tl.constexpr, BITS: tl.constexpr):
    first = tl.cast(block, tl.int64) * BLOCK
    row, column = tl.arange(0, BLOCK), tl.arange(0, 1 << BITS)
    at = row[:, None] * n + column[None, :]
    inside = (row < rows - first)[:, None] & (column < n)[None, :]
    tile = tl.load(x + first * n + at, mask=inside, other=0.0).to(tl.float32)
    tile = hadamard_tile(tile, BITS) * scale
    tl.store(out + first * n + at, tile.to(out.dtype.element_ty), mask=inside)
