"""Philox4x32-10 in plain tensor arithmetic: random numbers as a pure function of a counter and a key.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
# Rounds that leave counters which vary along one axis each in smaller tensors than their broadcast.
CHEAP_ROUNDS = 2

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
    """Four independent standard normals (float32) from four random words, elementwise (Box, Muller 1958)."""
    return *_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])


def _box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    radius = uniform_open(word0).log_().mul_(-2.0).sqrt_()
    angle = uniform_open(word1).mul_(2.0 * math.pi)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)
