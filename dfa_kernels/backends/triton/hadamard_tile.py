"""The Walsh–Hadamard transform of tiles that lie in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hadamard_tile(x, BITS: tl.constexpr):
    """H x of every 2^BITS neighbours along the last axis of x [R, N], in Sylvester's order, not scaled.

    One butterfly a bit, written so that the compiler sees sums and differences of halves and chooses itself which bits
    of the index live in a thread, in a warp and in shared memory.
    """
    for bit in tl.static_range(BITS):
        x = _butterflies(x, 1 << bit)
    return x


@triton.jit
def _butterflies(x, DISTANCE: tl.constexpr):
    R: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    pairs = tl.reshape(x, (R, N // (2 * DISTANCE), 2, DISTANCE))
    left, right = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    mixed = tl.permute(tl.join(left + right, left - right), (0, 1, 3, 2))
    return tl.reshape(mixed, (R, N))
