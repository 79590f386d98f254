"""Entries of U: an oracle of their own, statistics, and independence of how they are cut."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_philox import reference

from dfa_kernels.feedback import entries
from dfa_kernels.feedback.entries import Stream, default_nonzeros, fill, packed_signs, sparse_entries, unpack_signs
from dfa_kernels.feedback.fastfood import fastfood_diagonals

CPU = torch.device("cpu")
KURTOSIS = {"gaussian": 3.0, "uniform": 1.8, "rademacher": 1.0}
BIG_ROW = 2**40 + 5


def words_at(seed: int, stream: int, row: int, call: int) -> tuple[int, ...]:
    return reference((call, row & 0xFFFFFFFF, row >> 32, stream), (seed & 0xFFFFFFFF, seed >> 32))


def oracle(kind: str, seed: int, row: int, column: int) -> float:
    if kind == "rademacher":
        word = words_at(seed, Stream.RADEMACHER, row, column // 128)[column // 32 % 4]
        return 1.0 if word >> column % 32 & 1 else -1.0
    if kind == "uniform":
        word = words_at(seed, Stream.UNIFORM, row, column // 4)[column % 4]
        return (2 * ((word >> 8) + 0.5) * 2.0**-24 - 1) * math.sqrt(3)
    words = words_at(seed, Stream.GAUSSIAN, row, column // 4)
    radius_word, angle_word = words[column % 4 // 2 * 2 :][:2]
    radius = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**32))
    angle = 2 * math.pi * (angle_word + 0.5) / 2**32
    return radius * (math.sin(angle) if column % 2 else math.cos(angle))


@pytest.mark.parametrize("kind", KURTOSIS)
@pytest.mark.parametrize(("seed", "row"), [(0, 0), (2**64 - 1, BIG_ROW), (2**33 + 7, 2**32 - 2)])
def test_entries_are_the_oracles(kind, seed, row):
    got = fill(torch.full((4, 150), math.nan), kind, seed, row=row, column=3)
    expected = [[oracle(kind, seed, row + r, 3 + c) for c in range(150)] for r in range(4)]
    tolerance = {"gaussian": 3e-6, "uniform": 2e-7, "rademacher": 0.0}[kind]
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KURTOSIS)
def test_statistics(kind):
    values = fill(torch.empty(1000, 1000), kind, 11).double()
    n = values.numel()
    fourth = KURTOSIS[kind]
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.square().mean() - 1) <= 5 * math.sqrt((fourth - 1) / n)
    assert values.pow(4).mean() == pytest.approx(fourth, abs=5 * math.sqrt(96 / n))
    norms = values.square().sum(1)
    assert abs(norms.mean() - 1000) <= 5 * math.sqrt(fourth - 1)
    assert norms.var().item() == pytest.approx(1000 * (fourth - 1), rel=0.3)


@pytest.mark.parametrize("kind", KURTOSIS)
def test_rows_and_columns_are_uncorrelated(kind):
    values = fill(torch.empty(2000, 64), kind, 5).double()
    off_diagonal = values.T @ values / 2000 - torch.diag(values.square().mean(0))
    assert off_diagonal.abs().max() < 6 / math.sqrt(2000)


@pytest.mark.parametrize("kind", KURTOSIS)
def test_seeds_and_streams_differ(kind):
    first, second = (fill(torch.empty(100, 100), kind, seed) for seed in (1, 2**32 + 1))
    other = fill(torch.empty(100, 100), kind, 1, stream=Stream.FASTFOOD_SIGNS)
    for another in (second, other):
        assert abs((first * another).mean()) < 5 / 100


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(KURTOSIS)),
    st.integers(0, 40),
    st.integers(0, 20),
    st.integers(0, 150),
    st.integers(0, 150),
)
def test_a_slice_is_the_wholes(kind, row, rows, column, columns):
    whole = fill(torch.empty(60, 300), kind, 9)
    part = fill(torch.full((rows, columns), math.nan), kind, 9, row=row, column=column)
    assert torch.equal(part, whole[row : row + rows, column : column + columns])


@pytest.mark.parametrize("kind", KURTOSIS)
def test_passes_do_not_show(kind, monkeypatch):
    whole = fill(torch.empty(700, 1001), kind, 4)
    monkeypatch.setattr(entries, "entries_per_pass", lambda device: 5000)
    assert torch.equal(fill(torch.empty(700, 1001), kind, 4), whole)


def test_lower_precision_is_the_rounded_entry():
    exact = fill(torch.empty(50, 50), "gaussian", 2)
    assert torch.equal(fill(torch.empty(50, 50, dtype=torch.bfloat16), "gaussian", 2), exact.bfloat16())


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 128, 129, 1000])
def test_packed_signs_are_the_entries(columns):
    words = packed_signs(6, range(3, 20), columns, CPU)
    assert words.dtype == torch.int32
    assert words.shape == (17, math.ceil(columns / 32))
    assert torch.equal(unpack_signs(words, columns), fill(torch.empty(17, columns), "rademacher", 6, row=3))


def sparse_oracle(seed: int, row: int, error_size: int, nonzeros: int) -> list[tuple[int, int]]:
    offset = words_at(seed, Stream.SPARSE, row, 0)[0] * error_size >> 32
    boundary = [j * error_size // nonzeros for j in range(nonzeros + 1)]
    found = []
    for j in range(nonzeros):
        position, sign = words_at(seed, Stream.SPARSE, row, 1 + j // 2)[2 * (j % 2) :][:2]
        inside = position * (boundary[j + 1] - boundary[j]) >> 32
        found.append(((offset + boundary[j] + inside) % error_size, 1 if sign & 1 else -1))
    return found


@pytest.mark.parametrize(("error_size", "nonzeros"), [(1, 1), (10, 4), (10, 10), (97, 13), (1000, 32)])
def test_sparse_entries_are_the_oracles(error_size, nonzeros):
    rows = range(BIG_ROW, BIG_ROW + 6)
    indices, signs = sparse_entries(2**63 + 1, rows, error_size, nonzeros, CPU)
    expected = [sparse_oracle(2**63 + 1, row, error_size, nonzeros) for row in rows]
    assert [list(zip(i, s, strict=True)) for i, s in zip(indices.tolist(), signs.tolist(), strict=True)] == expected
    assert (indices.dtype, signs.dtype) == (torch.int32, torch.int8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.data())
def test_sparse_columns_of_a_row_are_distinct(error_size, data):
    nonzeros = data.draw(st.integers(1, error_size))
    indices, _ = sparse_entries(data.draw(st.integers(0, 2**64 - 1)), range(50), error_size, nonzeros, CPU)
    ordered = indices.sort(1).values
    assert ordered.min() >= 0 and ordered.max() < error_size
    assert (ordered.diff(dim=1) > 0).all()


def test_every_column_has_unit_variance():
    rows, error_size, nonzeros = 40000, 29, 6
    indices, signs = sparse_entries(8, range(rows), error_size, nonzeros, CPU)
    share = torch.bincount(indices.flatten().long(), minlength=error_size) / rows
    p = nonzeros / error_size
    assert (share - p).abs().max() < 5 * math.sqrt(p * (1 - p) / rows)
    assert abs(signs.double().mean()) < 5 / math.sqrt(signs.numel())


def test_sparse_slices_are_rows_of_the_whole():
    whole = sparse_entries(8, range(100), 50, 7, CPU)
    part = sparse_entries(8, range(13, 40), 50, 7, CPU)
    assert all(torch.equal(a, b[13:40]) for a, b in zip(part, whole, strict=True))


def test_default_nonzeros_is_the_root_rounded_up():
    assert [default_nonzeros(n) for n in (1, 2, 4, 5, 9, 10, 1000, 1024, 1025)] == [
        1,
        2,
        2,
        3,
        3,
        4,
        32,
        32,
        33,
    ]


def digest(*parts):
    return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("gaussian", "0292310c2368c5ee"), ("uniform", "5a8663bfbba14754"), ("rademacher", "249c1c55d2383c77")],
)
def test_entries_never_change(kind, expected):
    """A checkpoint keeps the seed alone: other bits would be another U."""
    assert digest(fill(torch.empty(300, 500), kind, 2**40 + 3, row=2**32 - 100)) == expected


def test_sparse_entries_never_change():
    assert digest(*sparse_entries(7, range(2**32 - 5, 2**32 + 300), 1000, 32, CPU)) == "3b1d58b12e9e4c51"


def test_diagonals_of_fastfood_never_change():
    assert digest(*fastfood_diagonals(7, range(10, 30), 500, CPU)) == "311acaa8f88ffc40"
