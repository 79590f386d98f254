"""`hadamard`: the fast Walsh–Hadamard transform, a program for a few rows that lie in its registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import hadamard as composed
from .hadamard_tile import hadamard_tile
from .launch import check_device, on_device
from .problem import DTYPES

LARGEST = 2**15
NUMBERS_PER_THREAD = 32
MOST_WARPS = 32


def hadamard(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale · H x along the last dimension of x [..., n]; see `dfa_kernels.functional.hadamard_transform`."""
    check_device(x.device)
    n = x.shape[-1]
    length = 1 << composed.padded_bits(n)
    if x.dtype not in DTYPES or length > LARGEST:
        return composed.hadamard_by_products(x, scale)
    x = x.contiguous()
    out = torch.empty_like(x)
    if rows := x.numel() // n:
        warps, block = tile_of(length)
        with on_device(x.device):
            hadamard_kernel[(-(-rows // block),)](
                x, out, rows, n, float(scale), block, length.bit_length() - 1, num_warps=warps, enable_fp_fusion=True
            )
    return out


def tile_of(length: int) -> tuple[int, int]:
    """(warps, rows) of a program: 32 numbers in each thread as long as there are warps enough."""
    warps = min(MOST_WARPS, max(4, length // (32 * NUMBERS_PER_THREAD)))
    return warps, max(1, 32 * warps * NUMBERS_PER_THREAD // length)


@triton.jit(do_not_specialize=["rows", "scale"])
def hadamard_kernel(x, out, rows, n, scale, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Rows of n <= 2^BITS numbers, filled up with zeros; the first n of the result are kept."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row, column = tl.arange(0, BLOCK), tl.arange(0, 1 << BITS)
    at = row[:, None] * n + column[None, :]
    inside = (row < rows - first)[:, None] & (column < n)[None, :]
    tile = tl.load(x + first * n + at, mask=inside, other=0.0).to(tl.float32)
    tile = hadamard_tile(tile, BITS) * scale
    tl.store(out + first * n + at, tile.to(out.dtype.element_ty), mask=inside)
