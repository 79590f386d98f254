"""What the kernels share: which tile of which layer a program has, and δ of a tile.

Every layer's tensors travel as kernel arguments (a tuple per kind of tensor), so that a launch needs no table in memory
and no copy; a program picks its own by comparing its layer's number with each.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(values, index):
    """values[index] of a tuple, for an index that is only known when the kernel runs."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def multiple(value, DIVISOR: tl.constexpr):
    """value, which DIVISOR divides: said by arithmetic, since a hint would be lost when functions are inlined."""
    return value // DIVISOR * DIVISOR


@triton.jit
def pick_flag(MASK: tl.constexpr, index):
    """Whether bit `index` of a constant mask is set."""
    return ((MASK >> index) & 1) == 1


@triton.jit
def column_tiles(width, layer: tl.constexpr, BLOCK: tl.constexpr, WEIGHTS: tl.constexpr, BIASES: tl.constexpr):
    """Tiles along a layer's inputs: the bias needs the first one, and a layer without either none."""
    if (WEIGHTS >> layer) & 1:
        return tl.cdiv(width, BLOCK)
    return width * 0 + ((BIASES >> layer) & 1)


@triton.jit
def locate(
    tile, widths_in, widths_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, WEIGHTS: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """(layer, tile along its outputs, tile along its inputs) of the tile with this number.

    The last layer comes first: its δ is the error itself, so it never waits for a projection.
    """
    LAYERS: tl.constexpr = len(widths_in)
    layer = LAYERS - 1
    first = tile * 0
    end = tile * 0
    for i in tl.static_range(LAYERS - 1, -1, -1):
        here = tile >= end
        layer = tl.where(here, i, layer)
        first = tl.where(here, end, first)
        end += tl.cdiv(widths_out[i], BLOCK_M) * column_tiles(widths_in[i], i, BLOCK_N, WEIGHTS, BIASES)
    across = first * 0
    for i in tl.static_range(LAYERS):
        across = tl.where(layer == i, column_tiles(widths_in[i], i, BLOCK_N, WEIGHTS, BIASES), across)
    m, n = swizzle(tile - first, tl.cdiv(pick(widths_out, layer), BLOCK_M), across, GROUP_M)
    return layer, m, n


@triton.jit
def swizzle(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(m, n) in an order in which neighbours share rows and columns of both factors in the L2 cache."""
    per_group = GROUP_M * tiles_n
    group = tile // per_group
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tile % per_group
    return group * GROUP_M + within % height, within // height


@triton.jit
def slope_product(g, saved, p, q, which, DERIVATIVES: tl.constexpr):
    """g ⊙ f'(saved), of the activation numbered `which` in DERIVATIVES."""
    if len(DERIVATIVES) == 1:
        return DERIVATIVES[0](g, saved, p, q)
    product = g
    for i in tl.static_range(len(DERIVATIVES)):
        if which == i:
            product = DERIVATIVES[i](g, saved, p, q)
    return product
