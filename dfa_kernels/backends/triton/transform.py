"""The Walsh–Hadamard transform on a GPU: which rows a program has, and when it loads the next ones ahead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...feedback.hadamard import hadamard_by_products, padded_bits
from .configs import REGISTERS
from .kernels.hadamard_tile import MOST_BITS_AT_ONCE, hadamard_kernel
from .launch import check_device, on_device, target_of
from .problem import DTYPES

LARGEST_TRANSFORM = 2**15
NUMBERS_PER_THREAD = 32
MOST_WARPS = 32
LONG_ROW = 2**14
SHARED_MEMORY = ((120, 96 * 1024), (90, 224 * 1024), (86, 96 * 1024), (0, 160 * 1024))
"""Bytes that programs may use on a multiprocessor, from this capability on; a little less than there are."""


def hadamard(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale · H x along the last dimension of x [..., n]; see `dfa_kernels.functional.hadamard_transform`."""
    check_device(x.device)
    n = x.shape[-1]
    length = 1 << padded_bits(n)
    if x.dtype not in DTYPES or length > LARGEST_TRANSFORM:
        return hadamard_by_products(x, scale)
    x = x.contiguous()
    out = torch.empty_like(x)
    if rows := x.numel() // n:
        target = target_of(x.device)
        _, block = tile_of(length)
        blocks, ahead = -(-rows // block), programs_ahead(length, x.dtype, target.capability)
        programs = min(blocks, ahead * target.multiprocessors) if ahead else blocks
        with on_device(x.device):
            hadamard_kernel[(programs,)](
                x, out, rows, n, float(scale), block, length.bit_length() - 1, programs < blocks,
                **transform_options(length, ahead),
            )  # fmt: skip
    return out


def tile_of(length: int) -> tuple[int, int]:
    """(warps, rows) of a program: 32 numbers in each thread as long as there are warps enough.

    And no more warps than one row needs: what moves between warps goes through shared memory, with a barrier each time.
    """
    warps = min(MOST_WARPS, max(1, length // (32 * NUMBERS_PER_THREAD)))
    return warps, max(1, 32 * warps * NUMBERS_PER_THREAD // length)


def transform_options(length: int, ahead: int) -> dict[str, Any]:
    """What the compiler is told of a transform; ahead: `programs_ahead`, which have to fit into the registers."""
    warps, _ = tile_of(length)
    options: dict[str, Any] = dict(num_warps=warps, enable_fp_fusion=True)
    return options | dict(maxnreg=REGISTERS // (32 * warps * ahead)) if ahead else options


def programs_ahead(length: int, dtype: torch.dtype, capability: int) -> int:
    """How many programs on each multiprocessor transform rows while they load the next ones; 0 if none should.

    Short rows leave room for programs enough, of which some load while others transform. Of long ones a multiprocessor
    takes as many as its registers hold, if its shared memory holds their next rows, too.
    """
    if length < LONG_ROW:
        return 0
    scratch = 4 * min(length, 1 << MOST_BITS_AT_ONCE.value)
    most_shared = next(most for oldest, most in SHARED_MEMORY if capability >= oldest)
    programs: int = REGISTERS // (2 * NUMBERS_PER_THREAD * 32 * tile_of(length)[0])
    return programs if programs * (scratch + length * dtype.itemsize) <= most_shared else 0
