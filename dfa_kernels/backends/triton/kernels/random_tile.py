"""Philox4x32-10 and what becomes of its words, in tiles: the numbers of `dfa_kernels.feedback.philox` and `entries`.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ....feedback.philox import (
    COSINE,
    KEY_STEPS,
    MULTIPLIERS,
    NEGATIVE_SINE,
    ROUNDS,
    TWICE_NEGATIVE_LOG,
    TWICE_NEGATIVE_LOG_2,
)
from ....feedback.philox import ROOT_OF_HALF as ROOT_OF_HALF_BITS
from .rounded import product, root, step, total

MULTIPLIER_0 = tl.constexpr(MULTIPLIERS[0])
MULTIPLIER_1 = tl.constexpr(MULTIPLIERS[1])
KEY_STEP_0 = tl.constexpr(KEY_STEPS[0])
KEY_STEP_1 = tl.constexpr(KEY_STEPS[1])
PHILOX_ROUNDS = tl.constexpr(ROUNDS)
L9, L8, L7, L6, L5, L4, L3, L2, L1, L0 = map(tl.constexpr, TWICE_NEGATIVE_LOG)
S4, S3, S2, S1, S0 = map(tl.constexpr, NEGATIVE_SINE)
C5, C4, C3, C2, C1, C0 = map(tl.constexpr, COSINE)
LOG_2_HIGH, LOG_2_LOW = map(tl.constexpr, TWICE_NEGATIVE_LOG_2)
ROOT_OF_HALF = tl.constexpr(ROOT_OF_HALF_BITS)
TO_TURN = tl.constexpr(2.0**-31)
TO_UNIT = tl.constexpr(2.0**-32)
HALF_STEP = tl.constexpr(2.0**-33)
UNIFORM_SCALE = tl.constexpr(math.sqrt(3.0) * 2.0**-24)


@triton.jit
def philox4x32(word0, word1, word2, word3, key0, key1):
    """Four uint32 words for every counter; counters (uint32) of shapes that broadcast together."""
    key0, key1 = key0.to(tl.uint32), key1.to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        high0, low0 = tl.umulhi(word0, MULTIPLIER_0), word0 * MULTIPLIER_0
        high1, low1 = tl.umulhi(word2, MULTIPLIER_1), word2 * MULTIPLIER_1
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = key0 + KEY_STEP_0, key1 + KEY_STEP_1
    return word0, word1, word2, word3


@triton.jit
def halves(number):
    """The low and high words of numbers, which are not negative."""
    low = number.to(tl.uint32)
    high = (number >> 32).to(tl.uint32) if number.dtype == tl.int64 else low * 0
    return low, high


@triton.jit
def row_words(unit, call, STREAM: tl.constexpr, key0, key1):
    """The four words of every (row of U, call): unit [M], call [C] → four times uint32 [M, C]."""
    shape: tl.constexpr = (unit.shape[0], call.shape[0])
    low, high = halves(unit)
    word0 = tl.broadcast_to(call.to(tl.uint32)[None, :], shape)
    word1, word2 = tl.broadcast_to(low[:, None], shape), tl.broadcast_to(high[:, None], shape)
    return philox4x32(word0, word1, word2, tl.full(shape, STREAM, tl.uint32), key0, key1)


@triton.jit
def flat_words(unit, call, STREAM: tl.constexpr, key0, key1):
    """The four words of one call for every row of U: unit [M], call a number → four times uint32 [M]."""
    low, high = halves(unit)
    word0 = (tl.zeros_like(unit) + call).to(tl.uint32)
    return philox4x32(word0, low, high, tl.zeros_like(low) + STREAM, key0, key1)


@triton.jit
def once(x):
    """x [M], made by as few threads as hold it and handed to all others through shared memory.

    What is broadcast along a tile the compiler would rather make again in every thread that needs it, which for a
    Philox call costs far more. It does not look through a gather for what to make again.
    """
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)


@triton.jit
def normal_entries(word0, word1, word2, word3):
    """Standard normals [M, 4C] in the order of their columns (Box, Muller 1958)."""
    normal0, normal1 = box_muller(word0, word1)
    normal2, normal3 = box_muller(word2, word3)
    return tl.interleave(tl.interleave(normal0, normal2), tl.interleave(normal1, normal3))


@triton.jit
def box_muller(word0, word1):
    """The bits of `dfa_kernels.feedback.philox.normals`: its operations in its order, none fused with another."""
    radius = root(_twice_negative_log(_uniform_open(word0)))
    turn = product(word1.to(tl.int32, bitcast=True).to(tl.float32), TO_TURN)
    x = total(tl.abs(turn), -0.5)
    square = product(x, x)
    cosine = product(step(step(step(step(S4, square, S3), square, S2), square, S1), square, S0), x)
    sine = step(step(step(step(step(C5, square, C4), square, C3), square, C2), square, C1), square, C0)
    return product(cosine, radius), product(_with_sign_of(sine, word1), radius)


@triton.jit
def _twice_negative_log(u):
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - ROOT_OF_HALF) >> 23
    f = total((bits - (exponent << 23)).to(tl.float32, bitcast=True), -1.0)
    value = step(step(step(step(L9, f, L8), f, L7), f, L6), f, L5)
    value = product(step(step(step(step(step(value, f, L4), f, L3), f, L2), f, L1), f, L0), f)
    exponent = exponent.to(tl.float32)
    return total(total(product(exponent, LOG_2_LOW), value), product(exponent, LOG_2_HIGH))


@triton.jit
def _with_sign_of(x, word):
    """x with the uppermost bit of `word` for its sign."""
    bits = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF | word & 0x80000000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _uniform_open(word):
    return step(word.to(tl.float32), TO_UNIT, HALF_STEP)


@triton.jit
def uniform_entries(word0, word1, word2, word3):
    """Uniform numbers of unit variance [M, 4C] in the order of their columns."""
    even = tl.interleave(_uniform(word0), _uniform(word2))
    odd = tl.interleave(_uniform(word1), _uniform(word3))
    return tl.interleave(even, odd)


@triton.jit
def _uniform(word):
    # 2u - 1 as an odd integer over 2^24: exact in float32, where u itself is not.
    odd = (word >> 8).to(tl.int32) * 2 + (1 - 16777216)
    return odd.to(tl.float32) * UNIFORM_SCALE


@triton.jit
def sign_entries(word0, word1, word2, word3, column):
    """±1 [M, E] for columns [E] that lie in one call of 128 signs: words [M, 1]."""
    return bit_signs(word_of(column[None, :], word0, word1, word2, word3), column)


@triton.jit
def word_of(column, word0, word1, word2, word3):
    """Which of a call's words holds the sign of a column."""
    which = (column >> 5) & 3
    return tl.where(which < 2, tl.where(which == 0, word0, word1), tl.where(which == 2, word2, word3))


@triton.jit
def bit_signs(word, column):
    """±1 from bit (column mod 32) of each word; a set bit is +1."""
    bit = (word >> (column & 31)[None, :].to(tl.uint32)) & 1
    return (bit * 2).to(tl.float32) - 1.0
