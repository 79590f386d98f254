"""Philox4x32-10 and the distributions made from its words."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfa_kernels.feedback.philox import key_of, normals, philox4x32, uniform_open

MASK = 0xFFFFFFFF
WORD = st.integers(0, MASK)


def reference(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, written from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_of_random123(counter, key, expected):
    assert reference(counter, key) == expected
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


@settings(max_examples=100, deadline=None)
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_any_counter_and_key(counter, key):
    assert tuple(int(word) for word in philox4x32(counter, key)) == reference(counter, key)


@pytest.mark.parametrize("shapes", [((5,), (3, 1), (3, 1), ()), ((3, 5),) * 4, ((), (3, 1), (5,), (1, 1))])
def test_broadcast_counters(shapes):
    generator = torch.Generator().manual_seed(3)
    counter = tuple(torch.randint(0, 2**32, shape, generator=generator) for shape in shapes)
    before = tuple(word.clone() for word in counter)
    words = philox4x32(counter, (7, 9))
    full = torch.broadcast_tensors(*counter)
    for r in range(3):
        for c in range(5):
            expected = reference(tuple(int(word[r, c]) for word in full), (7, 9))
            assert tuple(int(word[r, c]) for word in words) == expected
    assert all(torch.equal(a, b) for a, b in zip(counter, before, strict=True))


def test_key_is_the_seeds_two_halves():
    assert key_of(0x123456789ABCDEF0) == (0x9ABCDEF0, 0x12345678)


def test_uniform_is_open_at_zero_and_closed_at_one():
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert uniform_open(words).tolist() == [2.0**-33, 2.0**-32 + 2.0**-33, 0.5, 1.0]


def test_normals_are_box_mullers():
    words = tuple(torch.randint(0, 2**32, (1000,), generator=torch.Generator().manual_seed(i)) for i in range(4))
    u = [(word.double() + 0.5) / 2**32 for word in words]
    got = normals(words)
    for i in (0, 2):
        radius, angle = (-2 * u[i].log()).sqrt(), 2 * math.pi * u[i + 1]
        torch.testing.assert_close(got[i].double(), radius * angle.cos(), rtol=0, atol=3e-6)
        torch.testing.assert_close(got[i + 1].double(), radius * angle.sin(), rtol=0, atol=3e-6)


def test_normals_of_extreme_words_are_finite():
    low, high = torch.tensor([0, 0, 2**32 - 1, 2**32 - 1]), torch.tensor([0, 2**32 - 1, 0, 2**32 - 1])
    for values in normals((low, high, high, low)):
        assert values.isfinite().all()
        assert values.abs().max() <= math.sqrt(66 * math.log(2)) * (1 + 1e-6)
