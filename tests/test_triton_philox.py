"""Random words and what is made of them in the kernels: the numbers of `dfa_kernels.feedback.entries`, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_philox import KNOWN, WORD, reference
from torch import Tensor
from triton_cases import DEVICE, FRESH, in_nans

from dfa_kernels.backends.triton.kernels.feedback_tile import feedback_tile, nearest_tf32
from dfa_kernels.backends.triton.kernels.random_tile import normal_entries, philox4x32
from dfa_kernels.feedback import entries
from dfa_kernels.feedback.philox import key_of, normals

SEEDS = [0, 7, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1]
ROWS = [0, 5, 2**31 - 3, 2**32 - 3, 2**32, 2**40 + 9]
TILE_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["key0", "key1"])
def words_kernel(counters, words, key0, key1, N: tl.constexpr):
    at = tl.arange(0, N)
    word0 = tl.load(counters + at).to(tl.uint32, bitcast=True)
    word1 = tl.load(counters + N + at).to(tl.uint32, bitcast=True)
    word2 = tl.load(counters + 2 * N + at).to(tl.uint32, bitcast=True)
    word3 = tl.load(counters + 3 * N + at).to(tl.uint32, bitcast=True)
    word0, word1, word2, word3 = philox4x32(word0, word1, word2, word3, key0, key1)
    tl.store(words + at, word0.to(tl.int32, bitcast=True))
    tl.store(words + N + at, word1.to(tl.int32, bitcast=True))
    tl.store(words + 2 * N + at, word2.to(tl.int32, bitcast=True))
    tl.store(words + 3 * N + at, word3.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["key0", "key1", "first_row", "rows", "error_size", "nonzeros"])
def tile_kernel(
    out, key0, key1, first_row, rows, first_column, error_size, nonzeros,
    SOURCE: tl.constexpr, ENTRY: tl.constexpr, ROUND: tl.constexpr, M: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    first_row = first_row.to(tl.int64)
    unit = first_row + tl.arange(0, M)
    tile = feedback_tile(
        (out,), key0, key1, first_row, unit, first_row + rows, first_column, error_size, nonzeros,
        SOURCE, E, 0, ENTRY, tl.float32, ROUND,
    )  # fmt: skip
    tl.store(out + tl.arange(0, M)[:, None] * E + tl.arange(0, E)[None, :], tile)


@triton.jit
def normals_kernel(words, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None]
    word0 = tl.load(words + at).to(tl.uint32, bitcast=True)
    word1 = tl.load(words + N + at).to(tl.uint32, bitcast=True)
    word2 = tl.load(words + 2 * N + at).to(tl.uint32, bitcast=True)
    word3 = tl.load(words + 3 * N + at).to(tl.uint32, bitcast=True)
    tl.store(out + at * 4 + tl.arange(0, 4)[None, :], normal_entries(word0, word1, word2, word3))


@triton.jit
def rounding_kernel(values, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(values + at, nearest_tf32(tl.load(values + at)))


def signed(word: int) -> int:
    """The int32 with these 32 bits."""
    return word - 2**32 if word >= 2**31 else word


def bits(columns: Sequence[Sequence[int]]) -> Tensor:
    """Words [N][4] as int32 [4, N]."""
    return torch.tensor([[signed(word) for word in column] for column in columns], dtype=torch.int32).t().contiguous()


def philox(counters: Sequence[tuple[int, ...]], key: tuple[int, int]) -> list[tuple[int, ...]]:
    words = torch.full((4, len(counters)), -1, dtype=torch.int32, device=DEVICE)
    words_kernel[(1,)](bits(counters).to(DEVICE), words, signed(key[0]), signed(key[1]), len(counters))
    return [tuple(int(word) & 0xFFFFFFFF for word in column) for column in words.t().tolist()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_of_random123(counter: Any, key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert philox([counter], key) == [expected]


@settings(**FRESH, max_examples=20)
@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=16, max_size=16), st.tuples(WORD, WORD))
def test_any_counter_and_key(counters: list[tuple[int, ...]], key: tuple[int, int]) -> None:
    assert philox(counters, key) == [reference(counter, key) for counter in counters]


def tile(
    source: str, seed: int, row: int, column: int, error_size: int, nonzeros: int = 0, M: int = 16, E: int = 32,
    dtype: torch.dtype = torch.float32, rows: int | None = None, rounded: bool = False,
) -> Tensor:  # fmt: skip
    """U[row : row + M, column : column + E] as the kernels make it."""
    out = in_nans(torch.full((M, E), math.nan))
    low, high = key_of(seed)
    tile_kernel[(1,)](
        out, signed(low), signed(high), row, M if rows is None else rows, column, error_size, nonzeros, source,
        TILE_DTYPE[dtype], rounded, M, E,
    )  # fmt: skip
    return out.cpu()


def filled(kind: str, seed: int, row: int, column: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return entries.fill(torch.empty(16, 32, dtype=dtype), kind, seed, row, column)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "uniform"])
@pytest.mark.parametrize("column", [0, 32, 96, 128, 224])
def test_entries_are_the_same_bits(kind: str, column: int) -> None:
    for seed, row in zip(SEEDS, ROWS, strict=True):
        found = tile(kind, seed, row, column, 1000)
        assert torch.equal(found, filled(kind, seed, row, column)), (seed, row)


def normals_of(words: Tensor) -> Tensor:
    """[N, 4] of words [N, 4] in [0, 2^32), from a kernel."""
    out = torch.full(words.shape, math.nan, device=DEVICE)
    normals_kernel[(1,)](words.t().contiguous().to(DEVICE, torch.int32), out, len(words))
    return out.cpu()


def extreme_words() -> Tensor:
    """0 and 1 of the radius's number, every eighth of a turn, and their neighbours: [N, 4]."""
    radii = [k * 2**31 + d for k in range(3) for d in (-129, -128, -1, 0, 1, 2**10)]
    turns = [k * 2**29 + d for k in range(9) for d in (-1, 0, 1, 2**10)]
    pairs = [(radius, turn, radius, turn) for radius in radii for turn in turns]
    return torch.tensor(pairs + pairs[: 2**10 - len(pairs)]) & 0xFFFFFFFF


def test_normals_of_any_words_are_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    for words in (extreme_words(), torch.randint(2**32, (2**14, 4), generator=generator)):
        expected = torch.stack(normals(tuple(words.unbind(1))), dim=1)
        assert expected.isfinite().all()
        assert torch.equal(normals_of(words).view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(("error_size", "nonzeros"), [(32, 1), (32, 6), (32, 32), (19, 7), (1, 1)])
def test_sparse_entries_are_the_same_bits(error_size: int, nonzeros: int) -> None:
    for seed, row in zip(SEEDS, ROWS, strict=True):
        found = tile("sparse_seed", seed, row, 0, error_size, nonzeros)
        columns, signs = entries.sparse_entries(seed, range(row, row + 16), error_size, nonzeros, torch.device("cpu"))
        expected = torch.zeros(16, 32).scatter_(1, columns.long(), signs.float())
        assert torch.equal(found, expected), (seed, row)


def test_entries_of_sparse_rows_in_later_columns() -> None:
    found = tile("sparse_seed", 5, 3, 64, 200, 20)
    columns, signs = entries.sparse_entries(5, range(3, 19), 200, 20, torch.device("cpu"))
    expected = torch.zeros(16, 200).scatter_(1, columns.long(), signs.float())
    assert torch.equal(found, expected[:, 64:96])


@pytest.mark.parametrize("kind", ["rademacher", "uniform", "gaussian"])
def test_entries_in_half_precision(kind: str) -> None:
    found = tile(kind, 9, 2**32 + 1, 32, 1000, dtype=torch.float16)
    expected = filled(kind, 9, 2**32 + 1, 32, torch.float16)
    if kind == "gaussian":
        # Two float32 numbers that differ in the last bit may round to neighbours.
        assert ((found.half().view(torch.int16) - expected.view(torch.int16)).abs() <= 1).all()
    else:
        assert torch.equal(found, expected.float())


@pytest.mark.parametrize("source", ["gaussian", "uniform", "rademacher"])
def test_outside_of_the_matrix_is_zero(source: str) -> None:
    found = tile(source, 3, 0, 32, 45, rows=11)
    assert (found[:11, :13] != 0).all()
    assert not found[11:].any()
    assert not found[:, 13:].any()


def to_tf32(values: Tensor) -> Tensor:
    """float64 of the nearest number with ten bits behind the leading one; ties go away from zero."""
    mantissa, exponent = torch.frexp(values.double())
    return torch.ldexp(torch.copysign((mantissa.abs() * 2**11 + 0.5).floor() / 2**11, mantissa), exponent)


def test_nearest_tf32() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1024, generator=generator) * torch.logspace(-30, 30, 1024)
    step = 2.0**-10
    values[:6] = torch.tensor([1 + step / 2, -1 - step / 2, 1 + step * 1.5, 1 + step * 0.4999, 0.0, 2 - step / 4])
    expected = to_tf32(values)
    out = values.clone().to(DEVICE)
    rounding_kernel[(1,)](out, 1024)
    assert torch.equal(out.cpu().double(), expected)


@pytest.mark.parametrize("source", ["gaussian", "uniform"])
def test_entries_for_tensor_cores_are_rounded_to_tf32(source: str) -> None:
    """Where the error is in half precision. Tensor cores would truncate them, and so make every product smaller."""
    exact, rounded = tile(source, 3, 5, 0, 1000), tile(source, 3, 5, 0, 1000, rounded=True)
    assert torch.equal(rounded.double(), to_tf32(exact))
    assert not torch.equal(rounded, exact)
