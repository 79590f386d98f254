"""Philox4x32-10 in plain tensor arithmetic: random numbers as a pure function of a counter and a key.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
# Rounds that leave counters which vary along one axis each in smaller tensors than their broadcast.
CHEAP_ROUNDS = 2

# Minimax polynomials from the highest power on, their coefficients rounded to float32 one after the other, the lowest
# power first. -2 log(1 + f) / f for 1 + f from sqrt(1/2) to sqrt(2), to 6e-9 of the logarithm.
TWICE_NEGATIVE_LOG = (
    0.15272724628448486, -0.25524285435676575, 0.26319196820259094, -0.2840317189693451, 0.3324682116508484,
    -0.4000248312950134, 0.5000163912773132, -0.6666666269302368, 1.0, -2.0,
)  # fmt: skip
# -sin(πx) / x and cos(πx) in x² for |x| <= 1/2, to 8e-9 and 2e-9.
NEGATIVE_SINE = (
    -0.07643380761146545, 0.5976253747940063, -2.549957752227783, 5.1677021980285645, -3.141592502593994,
)  # fmt: skip
COSINE = (
    -0.023963874205946922, 0.23468376696109772, -1.335161566734314, 4.0587053298950195, -4.934802055358887, 1.0,
)  # fmt: skip
# -2 log 2 in two parts, of which small multiples of the first are exact.
TWICE_NEGATIVE_LOG_2 = (-1.38629150390625, -2.857213530660374e-06)
# The bits of sqrt(1/2) as float32.
ROOT_OF_HALF = 0x3F3504F3

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def key_of(seed: int) -> tuple[int, int]:
    """The Philox key of a 64-bit seed: its low and its high 32 bits."""
    return seed & MASK32, seed >> 32 & MASK32


def philox4x32(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], key: tuple[int, int]) -> Words:
    """Four random 32-bit words for every counter.

    counter: four int64 tensors or ints in [0, 2^32), of shapes that broadcast together; words that vary along
    one axis only should come as such, since the first two rounds then cost next to nothing. key: two ints in
    [0, 2^32). Returns four int64 tensors of values in [0, 2^32), of the broadcast shape. Values as
    Random123's philox4x32-10.
    """
    words = [torch.as_tensor(word, dtype=torch.int64) for word in counter]
    for step in range(CHEAP_ROUNDS):
        words = _round(words, _round_key(key, step))
    shape = torch.broadcast_shapes(*(word.shape for word in words))
    words = [word.expand(shape).clone(memory_format=torch.contiguous_format) for word in words]
    scratch = torch.empty_like(words[0])
    for step in range(CHEAP_ROUNDS, ROUNDS):
        words = _round_(words, _round_key(key, step), scratch)
    return words[0], words[1].bitwise_and_(MASK32), words[2], words[3].bitwise_and_(MASK32)


def _round_key(key: tuple[int, int], step: int) -> tuple[int, int]:
    return (key[0] + step * KEY_STEPS[0]) & MASK32, (key[1] + step * KEY_STEPS[1]) & MASK32


# An int64 product wraps modulo 2^64, so its bits are those of the unsigned one. Words 1 and 3 only ever enter
# an exclusive or: whatever stands above their 32 bits goes with the mask of the next round.


def _round(words: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    product0, product1 = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]
    word0 = (product1 >> 32 ^ words[1] ^ key[0]) & MASK32
    word2 = (product0 >> 32 ^ words[3] ^ key[1]) & MASK32
    return [word0, product1, word2, product0]


def _round_(words: list[Tensor], key: tuple[int, int], scratch: Tensor) -> list[Tensor]:
    """_round in the memory of its four words: fresh temporaries would cost more than the arithmetic."""
    product0, product1 = words[0].mul_(MULTIPLIERS[0]), words[2].mul_(MULTIPLIERS[1])
    word0 = words[1].bitwise_xor_(key[0]).bitwise_xor_(torch.bitwise_right_shift(product1, 32, out=scratch))
    word2 = words[3].bitwise_xor_(key[1]).bitwise_xor_(torch.bitwise_right_shift(product0, 32, out=scratch))
    return [word0.bitwise_and_(MASK32), product1, word2.bitwise_and_(MASK32), product0]


def uniform_open(words: Tensor) -> Tensor:
    """float32 numbers in (0, 1] from words in [0, 2^32), elementwise: float32(w) · 2^-32 + 2^-33."""
    return words.to(torch.float32).mul_(2.0**-32).add_(2.0**-33)


def normals(words: Words) -> Words:
    """Four independent standard normals (float32) from four random words, elementwise (Box, Muller 1958).

    The same to the last bit on every device and in the kernels: no library's logarithm, sine or cosine has a part in
    it, only float32 sums, products and square roots, each of which is rounded by itself, to nearest.
    """
    return *_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])


def _box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Radius sqrt(-2 log u) with u = uniform_open(word0), times cosine and sine of the angle 2π word1 / 2^32."""
    radius = rounded_root(_twice_negative_log(uniform_open(word0)))
    # As a signed number the word is the angle's distance from 0 in units of π / 2^31.
    turn = word1.to(torch.int32).to(torch.float32).mul_(2.0**-31)
    # |angle| = π/2 + πx, so its cosine is -sin πx and its sine cos πx.
    x = turn.abs().sub_(0.5)
    square = x * x
    cosine = _polynomial(square, NEGATIVE_SINE).mul_(x)
    sine = _polynomial(square, COSINE).copysign_(turn)
    return cosine.mul_(radius), sine.mul_(radius)


def rounded_root(x: Tensor) -> Tensor:
    """sqrt of float32 numbers, rounded to nearest; on a CPU torch's own may be off in the last bit.

    float64 has more than twice the bits, so no root of a float32 comes near enough to where the rounding turns.
    """
    return x.double().sqrt().to(torch.float32)


def _twice_negative_log(u: Tensor) -> Tensor:
    """-2 log u, of float32 numbers that are positive and normal, in their memory."""
    bits = u.view(torch.int32)
    exponent = bits.sub(ROOT_OF_HALF).bitwise_right_shift_(23)
    # u = 2^exponent (1 + f) with 1 + f between sqrt(1/2) and sqrt(2).
    f = bits.sub_(exponent.bitwise_left_shift(23)).view(torch.float32).sub_(1.0)
    exponent = exponent.to(torch.float32)
    near_one = _polynomial(f, TWICE_NEGATIVE_LOG).mul_(f)
    return near_one.add_(exponent.mul(TWICE_NEGATIVE_LOG_2[1])).add_(exponent.mul_(TWICE_NEGATIVE_LOG_2[0]))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """By Horner's rule; coefficients from the highest power on, exact in float32."""
    first, second, *rest = coefficients
    value = x.mul(first).add_(second)
    for coefficient in rest:
        value.mul_(x).add_(coefficient)
    return value
