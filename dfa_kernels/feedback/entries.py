"""The entries of the feedback matrix U as a pure function of (seed, kind, row, column).

Every Philox counter is (call, row low, row high, stream): no tile, block or slice enters it, so any part of U
can be made anywhere, in any order, with the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .philox import MASK32, Words, key_of, normals, philox4x32

SIGNS_PER_CALL = 128
SIGN_BIT = -(2**31)
MINUS_ONE = 0xBF800000 - 2**32


class Stream(IntEnum):
    """Last word of the Philox counter: one independent stream of random words per use."""

    GAUSSIAN = 1
    UNIFORM = 2
    RADEMACHER = 3
    SPARSE = 4
    FASTFOOD_SIGNS = 5
    FASTFOOD_PERMUTATION = 6
    FASTFOOD_GAUSSIAN = 7
    FASTFOOD_SCALING = 8


class _Draw(NamedTuple):
    stream: Stream
    per_call: int
    from_words: Callable[[Words], Tensor]


def entries_per_pass(device: torch.device) -> int:
    """How many entries to make at once: temporaries stay in a CPU's cache, other devices get enough work."""
    return 2**19 if device.type == "cpu" else 2**22


def row_passes(rows: range, entries_per_row: int, device: torch.device) -> Iterator[range]:
    """Consecutive pieces of `rows`, each of about entries_per_pass entries."""
    step = max(1, entries_per_pass(device) // max(1, entries_per_row))
    return (rows[start : start + step] for start in range(0, len(rows), step))


def row_words(seed: int, stream: Stream, rows: range, calls: range, device: torch.device) -> Words:
    """The four Philox words of every (row, call), each int64 [len(rows), len(calls)]."""
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    call = torch.arange(calls.start, calls.stop, device=device)
    return philox4x32((call, row & MASK32, row >> 32, int(stream)), key_of(seed))


def _normal_entries(words: Words) -> Tensor:
    return torch.stack(normals(words), dim=-1).flatten(1)


def _uniform_entries(words: Words) -> Tensor:
    # 2u - 1 for u = ((w >> 8) + 0.5) / 2^24 is this odd integer over 2^24: exact in float32, where u is not.
    odd = torch.stack(words, dim=-1).bitwise_right_shift_(8).mul_(2).add_(1 - 2**24)
    return odd.to(torch.float32).mul_(math.sqrt(3.0) * 2.0**-24).flatten(1)


def _sign_entries(words: Words) -> Tensor:
    return unpack_signs(_packed(words), SIGNS_PER_CALL * words[0].shape[1])


def _packed(words: Words) -> Tensor:
    return torch.stack(words, dim=-1).flatten(1).to(torch.int32)


_DRAWS = {
    "gaussian": _Draw(Stream.GAUSSIAN, 4, _normal_entries),
    "uniform": _Draw(Stream.UNIFORM, 4, _uniform_entries),
    "rademacher": _Draw(Stream.RADEMACHER, SIGNS_PER_CALL, _sign_entries),
}


def fill(out: Tensor, kind: str, seed: int, row: int = 0, column: int = 0, stream: Stream | None = None) -> Tensor:
    """Write U[row : row + R, column : column + C] into `out` [R, C], of any floating dtype, and return it.

    kind: "gaussian", "uniform" (both of unit variance) or "rademacher". Entries are float32, rounded to
    out.dtype.
    stream: draw from this stream in place of the kind's own.
    """
    draw = _DRAWS[kind]
    calls = range(column // draw.per_call, -(-(column + out.shape[1]) // draw.per_call))
    lead = column - calls.start * draw.per_call
    words = row_words(seed, stream or draw.stream, range(row, row + out.shape[0]), calls, out.device)
    return out.copy_(draw.from_words(words)[:, lead : lead + out.shape[1]])


def packed_signs(
    seed: int, rows: range, columns: int, device: torch.device, stream: Stream = Stream.RADEMACHER
) -> Tensor:
    """The first `columns` Rademacher signs of every row as bits, int32 [len(rows), ceil(columns / 32)].

    Column c is bit c % 32 of word c // 32; a set bit is +1. Bits beyond the last column are random too.
    """
    calls = range(-(-columns // SIGNS_PER_CALL))
    return _packed(row_words(seed, stream, rows, calls, device))[:, : -(-columns // 32)]


def unpack_signs(words: Tensor, columns: int) -> Tensor:
    """float32 [R, columns] of ±1 from packed bits, int32 [R, ceil(columns / 32)]."""
    to_top = torch.arange(31, -1, -1, dtype=torch.int32, device=words.device)
    # -1.0f with its sign flipped where the bit is set: three integer operations, no conversion.
    bits = (words[:, :, None] << to_top).bitwise_and_(SIGN_BIT).bitwise_xor_(MINUS_ONE)
    return bits.view(torch.float32).flatten(1)[:, :columns]


def default_nonzeros(error_size: int) -> int:
    """ceil(sqrt(E)): the "very sparse random projections" of Li, Hastie and Church (KDD 2006)."""
    return max(1, math.isqrt(error_size - 1) + 1)


def sparse_entries(
    seed: int, rows: range, error_size: int, nonzeros: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Columns (int32) and signs (int8, ±1) of the non-zero entries, each [len(rows), nonzeros].

    Columns of a row are distinct: one per stratum [floor(jE/k), floor((j+1)E/k)), all rotated by a random
    offset of the row. Each column is hit with probability k/E, so entries ±sqrt(E/k) have variance one.
    """
    words = torch.stack(row_words(seed, Stream.SPARSE, rows, range(1 + (nonzeros + 1) // 2), device), dim=-1)
    offset = words[:, 0, :1] * error_size >> 32
    position, sign = words[:, 1:].reshape(len(rows), -1, 2)[:, :nonzeros].unbind(-1)
    boundary = torch.arange(nonzeros + 1, device=device) * error_size // nonzeros
    column = (offset + boundary[:-1] + (position * boundary.diff() >> 32)) % error_size
    return column.to(torch.int32), ((sign & 1) * 2 - 1).to(torch.int8)
