"""Tiles of a Fastfood projection, V = S H G Π H B in blocks of d = 2^k rows; see `dfa_kernels.feedback.fastfood`.

Everything of a block is in one tile, so that the transforms need no memory between them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....feedback.entries import Stream
from ....feedback.fastfood import SQUARE_UNITS as SQUARE_UNITS_OF_1
from .hadamard_tile import hadamard_tile
from .random_tile import box_muller, halves, normal_entries, philox4x32, sign_entries
from .rounded import product, root, step

SQUARE_UNITS = tl.constexpr(SQUARE_UNITS_OF_1)
SIGNS = tl.constexpr(int(Stream.FASTFOOD_SIGNS))
PERMUTATION = tl.constexpr(int(Stream.FASTFOOD_PERMUTATION))
GAUSSIAN = tl.constexpr(int(Stream.FASTFOOD_GAUSSIAN))
SCALING = tl.constexpr(int(Stream.FASTFOOD_SCALING))


@triton.jit
def fastfood_tile(
    error, stored, key0, key1, first_unit, units, row, rows, error_size, stride_row, stride_column,
    SOURCE: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """e Vᵀ at rows [R] and the N units from first_unit on, a multiple of d = 2^BITS: float32 [R, N], not scaled."""
    component = (first_unit + tl.arange(0, N)) % (1 << BITS)
    at = row[:, None] * stride_row + component[None, :].to(row.dtype) * stride_column
    e = tl.load(error + at, mask=(row < rows)[:, None] & (component < error_size)[None, :], other=0.0)
    return fastfood_product(e.to(tl.float32), stored, key0, key1, first_unit, units, SOURCE, BITS)


@triton.jit
def fastfood_product(x, stored, key0, key1, first_unit, units, SOURCE: tl.constexpr, BITS: tl.constexpr):
    """x Vᵀ for x [R, N] that repeats its rows of 2^BITS components for every block: float32 [R, N].

    What is stored reaches up to `units`, rounded up to a whole block; beyond that the product means nothing.
    """
    R: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    if SOURCE == "fastfood":
        sign, source, gaussian, scaling = _stored_parts(stored, first_unit, units, N, 1 << BITS)
    else:
        sign, source, gaussian, scaling = _parts(first_unit >> BITS, key0, key1, N, BITS)
    x = hadamard_tile(x * sign[None, :], BITS)
    place = (tl.arange(0, N) >> BITS << BITS) + source
    # As one long row: a gather of one dimension goes through shared memory, one of two is a shuffle for each candidate.
    flat = (tl.arange(0, R * N) & -N) + tl.reshape(tl.broadcast_to(place[None, :], (R, N)), (R * N,))
    x = tl.reshape(tl.gather(tl.reshape(x, (R * N,)), flat, 0), (R, N))
    return hadamard_tile(x * gaussian[None, :], BITS) * scaling[None, :]


@triton.jit
def _stored_parts(stored, first_unit, units, N: tl.constexpr, D: tl.constexpr):
    """As `_parts`, from memory."""
    unit = first_unit.to(tl.int64) + tl.arange(0, N)
    inside = unit < tl.cdiv(units, D).to(tl.int64) * D
    sign = tl.load(stored[0] + unit, mask=inside, other=0).to(tl.float32)
    source = tl.load(stored[1] + unit, mask=inside, other=0)
    gaussian = tl.load(stored[2] + unit, mask=inside, other=0.0)
    scaling = tl.load(stored[3] + unit, mask=inside, other=0.0)
    return sign, source, gaussian, scaling


@triton.jit
def _parts(first_block, key0, key1, N: tl.constexpr, BITS: tl.constexpr):
    """Signs, permutation, Gaussian diagonal and scaling of the N units from a block on, each [N]."""
    D: tl.constexpr = 1 << BITS
    gaussian = _normals(first_block, GAUSSIAN, key0, key1, N, BITS)
    normal = _normals(first_block, SCALING, key0, key1, N, BITS)
    VARIANCE: tl.constexpr = 2.0 / (9.0 * D)
    ROOT: tl.constexpr = VARIANCE**0.5
    # To the bits of `dfa_kernels.feedback.fastfood`.
    cube_root = tl.maximum(step(normal, ROOT, 1.0 - VARIANCE), 0.0)
    scaling = product(product(cube_root, root(cube_root)), _inverse_norms(gaussian, BITS))
    return _signs(first_block, key0, key1, N, BITS), _permutation(first_block, key0, key1, N, BITS), gaussian, scaling


@triton.jit
def _inverse_norms(x, BITS: tl.constexpr):
    """1 / the norm of every block of 2^BITS of x [N], at each of its places."""
    N: tl.constexpr = x.shape[0]
    squares = tl.reshape(product(product(x, x), SQUARE_UNITS).to(tl.int64), (N >> BITS, 1 << BITS))
    norms = root(product(tl.sum(squares, axis=1).to(tl.float32), 1.0 / SQUARE_UNITS))
    inverse = tl.div_rn(tl.full(norms.shape, 1.0, tl.float32), norms)
    return tl.reshape(tl.broadcast_to(inverse[:, None], (N >> BITS, 1 << BITS)), (N,))


@triton.jit
def _words(first_block, key0, key1, STREAM: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, CALLS: tl.constexpr):
    """The four Philox words of every STEP units: uint32 [N / STEP]; CALLS of them make a block."""
    index = tl.arange(0, N // STEP)
    low, high = halves(first_block + index // CALLS)
    return philox4x32((index % CALLS).to(tl.uint32), low, high, low * 0 + STREAM, key0, key1)


@triton.jit
def _normals(first_block, STREAM: tl.constexpr, key0, key1, N: tl.constexpr, BITS: tl.constexpr):
    STEP: tl.constexpr = min(4, 1 << BITS)
    word0, word1, word2, word3 = _words(first_block, key0, key1, STREAM, N, STEP, (1 << BITS) // STEP)
    if STEP == 4:
        normals = normal_entries(word0, word1, word2, word3)
    else:
        normal0, normal1 = box_muller(word0, word1)
        normals = normal0 if STEP == 1 else tl.interleave(normal0, normal1)
    return normals


@triton.jit
def _signs(first_block, key0, key1, N: tl.constexpr, BITS: tl.constexpr):
    STEP: tl.constexpr = min(128, 1 << BITS)
    word0, word1, word2, word3 = _words(first_block, key0, key1, SIGNS, N, STEP, (1 << BITS) // STEP)
    signs = sign_entries(word0[:, None], word1[:, None], word2[:, None], word3[:, None], tl.arange(0, STEP))
    return tl.reshape(signs, (N,))


@triton.jit
def _permutation(first_block, key0, key1, N: tl.constexpr, BITS: tl.constexpr):
    D: tl.constexpr = 1 << BITS
    SHIFT: tl.constexpr = max(1, BITS // 2)
    a0, b0, a1, b1 = _keys(first_block, 0, key0, key1, N, BITS)
    a2, b2, a3, b3 = _keys(first_block, 1, key0, key1, N, BITS)
    x = tl.broadcast_to(tl.arange(0, D).to(tl.uint32)[None, :], (N // D, D))
    x = _mix(x, a0, b0, D, SHIFT)
    x = _mix(x, a1, b1, D, SHIFT)
    x = _mix(x, a2, b2, D, SHIFT)
    x = _mix(x, a3, b3, D, SHIFT)
    return tl.reshape(x, (N,)).to(tl.int32)


@triton.jit
def _keys(first_block, call, key0, key1, N: tl.constexpr, BITS: tl.constexpr):
    low, high = halves(first_block + tl.arange(0, N >> BITS))
    zero = low * 0
    return philox4x32(zero + call, low, high, zero + PERMUTATION, key0, key1)


@triton.jit
def _mix(x, a, b, D: tl.constexpr, SHIFT: tl.constexpr):
    x = (x * (a * 2 + 1)[:, None] + b[:, None]) & (D - 1)
    return x ^ (x >> SHIFT)
