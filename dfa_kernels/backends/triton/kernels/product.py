"""The product of a weight gradient: δᵀ x of a tile, over all rows of the batch.

Neither tile has a second use, nor may it: Triton (3.6 to 3.9) then gives it a slot of shared memory too few, and the
next copy overwrites what the asynchronous product still reads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product_of_pointers(
    delta, x, first_out, first_in, width_out, stride, width_in, length,
    PRECISION: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of δ [length, width_out], in rows of `stride`, and x [length, width_in]."""
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    out = (first_out + tl.arange(0, BLOCK_M)).to(INDEX)
    column = (first_in + tl.arange(0, BLOCK_N)).to(INDEX)
    for first in range(0, length, BLOCK_K):
        row = (first + tl.arange(0, BLOCK_K)).to(INDEX)
        inside = (row < length)[:, None]
        delta_at = delta + row[:, None] * stride + out[None, :]
        delta_tile = tl.load(delta_at, mask=inside & (out < width_out)[None, :], other=0.0)
        x_at = x + row[:, None] * width_in + column[None, :]
        x_tile = tl.load(x_at, mask=inside & (column < width_in)[None, :], other=0.0)
        gradient = tl.dot(tl.trans(delta_tile), x_tile, gradient, input_precision=PRECISION)
    return gradient


@triton.jit
def product_of_views(
    delta, x, layer, first_out, first_in, length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """[BLOCK_M, BLOCK_N] of descriptors of δ [layers, length, outputs] and x [length, inputs]."""
    gradient = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, length, BLOCK_K):
        delta_tile = delta.load([layer, first, first_out]).reshape(BLOCK_K, BLOCK_M)
        x_tile = x.load([first, first_in])
        gradient = tl.dot(tl.trans(delta_tile), x_tile, gradient)
    return gradient
