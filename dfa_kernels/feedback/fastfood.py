"""Fastfood: a structured random matrix with Gaussian-like rows, in O(rows) memory and O(rows · log E) work.

Source: Le, Sarlos, Smola, "Fastfood: approximating kernel expansions in loglinear time", ICML 2013. A block
of d = 2^k >= E rows is V = S H G P H B / sqrt(d): B random signs, P a permutation, G a Gaussian diagonal, H
the Hadamard matrix, S a diagonal that gives every row the norm of a Gaussian row. Blocks are stacked; the
first E columns of V meet the error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .entries import Stream, fill, packed_signs, row_words, unpack_signs
from .hadamard import padded_bits, walsh_hadamard
from .philox import rounded_root

PERMUTATION_ROUNDS = 4
# Of which squares of normals are made up when they are added; 2^17 of the largest, 46, fit into 63 bits.
SQUARE_UNITS = 2.0**40
DIAGONALS = (torch.int8, torch.int32, torch.float32, torch.float32)


def block_rows(error_size: int) -> int:
    """d, the rows of a block: error_size rounded up to a power of two."""
    return 1 << padded_bits(error_size)


def fastfood_diagonals(seed: int, blocks: range, error_size: int, device: torch.device) -> list[Tensor]:
    """What defines V in these blocks, each [len(blocks), d]: B (int8), P (int32), G (float32), S (float32).

    Every value is a function of (seed, block, index). S holds s / (||G|| sqrt(d)), so V is S H G P H B as it
    stands.
    """
    d = block_rows(error_size)
    signs = unpack_signs(packed_signs(seed, blocks, d, device, Stream.FASTFOOD_SIGNS), d).to(torch.int8)
    gaussian = _normals(seed, Stream.FASTFOOD_GAUSSIAN, blocks, d, device)
    normal = _normals(seed, Stream.FASTFOOD_SCALING, blocks, d, device)
    scaling = _relative_chi(normal).mul_(_norms(gaussian).reciprocal_())
    return [signs, _permutation(seed, blocks, d, device), gaussian, scaling]


def _normals(seed: int, stream: Stream, blocks: range, d: int, device: torch.device) -> Tensor:
    out = torch.empty(len(blocks), d, dtype=torch.float32, device=device)
    return fill(out, "gaussian", seed, row=blocks.start, stream=stream)


def _norms(rows: Tensor) -> Tensor:
    """||row||, [len(rows), 1]. Squares are added as integers, of which any order gives the same sum."""
    total = rows.square().mul_(SQUARE_UNITS).to(torch.int64).sum(1, keepdim=True)
    return rounded_root(total.to(torch.float32).div_(SQUARE_UNITS))


def _relative_chi(normal: Tensor) -> Tensor:
    """chi-distributed numbers with d = normal.shape[-1] degrees of freedom, over sqrt(d), each from a standard normal.

    An approximation, by Wilson and Hilferty (1931): chi² = d (1 - 2/(9d) + z sqrt(2/(9d)))³, and 0 where
    negative.
    """
    variance = 2.0 / (9.0 * normal.shape[-1])
    cube_root = normal.mul(math.sqrt(variance)).add_(1.0 - variance).clamp_(min=0.0)
    return rounded_root(cube_root).mul_(cube_root)


def _permutation(seed: int, blocks: range, d: int, device: torch.device) -> Tensor:
    """A keyed bijection of 0 .. d-1 per block, int32 [len(blocks), d], computable index by index.

    Rounds of x -> (2a+1)x + b modulo d and x -> x xor (x >> shift), each of which can be undone.
    """
    calls = range(PERMUTATION_ROUNDS // 2)
    words = row_words(seed, Stream.FASTFOOD_PERMUTATION, blocks, calls, device)
    keys = torch.stack(words, dim=-1).view(len(blocks), PERMUTATION_ROUNDS, 2, 1)
    shift = max(1, padded_bits(d) // 2)
    x = torch.arange(d, device=device).expand(len(blocks), d)
    for step in range(PERMUTATION_ROUNDS):
        x = (x * (2 * keys[:, step, 0] + 1) + keys[:, step, 1]) & (d - 1)
        x = x ^ (x >> shift)
    return x.to(torch.int32)


def block_products(padded: Tensor, signs: Tensor, permutation: Tensor, gaussian: Tensor, scaling: Tensor) -> Tensor:
    """V[r] errorᵀ [blocks · d, b], in the dtype of the padded error, for the rows r of the diagonals' blocks."""
    # The batch comes last throughout, so that the permutation moves whole rows of it.
    blocks, d = signs.shape
    first_rows = torch.arange(0, blocks * d, d, dtype=torch.int32, device=padded.device)[:, None]
    x = walsh_hadamard(padded * signs.to(padded.dtype)[:, :, None])
    x = x.view(blocks * d, -1).index_select(0, (permutation + first_rows).view(-1))
    x = walsh_hadamard(x.mul_(gaussian.view(-1, 1)).view(blocks, d, -1))
    return x.view(blocks * d, -1).mul_(scaling.view(-1, 1))
