"""The headers that csrc's kernels are made of, compiled for the CPU: what they compute is what the package defines."""

from __future__ import annotations

import ctypes
import math
from random import Random
from typing import Any

import pytest
import torch
from cuda_host import SOURCES, floats, host_library, needs_a_compiler
from torch import Tensor
from triton_cases import CASES, keep

from dfa_kernels.activations import ACTIVATIONS
from dfa_kernels.backends.csrc import arguments
from dfa_kernels.backends.csrc.arguments import DTYPES, Arguments, arguments_of
from dfa_kernels.backends.csrc.arguments import SOURCES as ORIGINS
from dfa_kernels.backends.csrc.looks import ErrorLooks
from dfa_kernels.backends.csrc.projected import source_of
from dfa_kernels.feedback.entries import fill, unpack_signs
from dfa_kernels.feedback.kinds import FEEDBACK_KINDS
from dfa_kernels.feedback.philox import normals
from dfa_kernels.feedback.spec import FeedbackSpec
from dfa_kernels.updates import RULES

pytestmark = needs_a_compiler

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def raw() -> ctypes.CDLL:
    return host_library()[1]


# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> Any:
    numbers = [int(word, 16) for word in text.split()]
    return (ctypes.c_uint * len(numbers))(*numbers)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox(raw: ctypes.CDLL, counter: str, key: str, expected: str) -> None:
    found = (ctypes.c_uint * 4)()
    raw.test_philox(words(counter), words(key), found)
    assert list(found) == list(words(expected))


def test_normals_to_the_bit(raw: ctypes.CDLL) -> None:
    """Also of the first and last words, whose logarithms are those of the smallest number and of 1."""
    random = torch.randint(2**32, (2, 100_000), generator=torch.Generator().manual_seed(0))
    extreme = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    pairs = torch.cat([random, torch.cartesian_prod(extreme, extreme).T], dim=1)
    expected = normals((pairs[0], pairs[1], pairs[0], pairs[1]))[:2]
    found = torch.empty(2, pairs.shape[1])
    given = [row.to(torch.uint32).contiguous() for row in pairs]
    raw.test_normals(
        *[ctypes.c_void_p(row.data_ptr()) for row in given], pairs.shape[1], floats(found[0]), floats(found[1])
    )
    assert torch.equal(found, torch.stack(expected))


def some_entries(raw: ctypes.CDLL, spec: FeedbackSpec, unit: int, units: int, E: int, stored: Tensor | None) -> Tensor:
    source = source_of(ErrorLooks(torch.Size((1, E)), (E, 1), torch.float32, spec, stored is not None, False))
    given = arguments_of(
        dict(
            source=ORIGINS[source], stored_dtype=DTYPES[spec.dtype], error_size=E, key0=spec.seed & 0xFFFFFFFF,
            key1=spec.seed >> 32, nonzeros=spec.nonzeros_per_row(E) if source == "nonzeros" else 0,
        ),
        [],
    )  # fmt: skip
    given.stored = None if stored is None else stored.data_ptr()
    quads = -(-E // 4)
    found = torch.full((units, 4 * quads), math.nan)
    raw.test_entries(ctypes.byref(given), ctypes.c_longlong(unit), units, quads, floats(found))
    assert not found[:, E:].any(), "columns beyond the error are 0"
    return found[:, :E]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("error_size", [1, 3, 10, 64, 129, 1000])
@pytest.mark.parametrize("kind", ["gaussian", "uniform", "rademacher", "sparse"])
@pytest.mark.parametrize("stored", [True, False], ids=["stored", "anew"])
def test_entries_to_the_bit(raw: ctypes.CDLL, kind: str, error_size: int, dtype: torch.dtype, stored: bool) -> None:
    """From any row on, beyond 2^32 too, as the definition makes them."""
    spec, row, first = FeedbackSpec(kind, "dense", seed=2**63 + 12345, dtype=dtype), FEEDBACK_KINDS[kind], 2**32 - 3
    assert row.make is not None
    for unit in (0, first):
        parts = row.make(spec, range(unit, unit + 7), error_size, CPU)
        if kind == "rademacher":
            expected = unpack_signs(parts[0], error_size)
        elif kind == "sparse":
            expected = torch.zeros(7, error_size).scatter_(1, parts[0].long(), parts[1].float())
        else:
            expected = parts[0].float()
        reads = stored and kind in ("gaussian", "uniform")
        if reads and unit:
            continue
        found = some_entries(raw, spec, unit, 7, error_size, parts[0] if reads else None)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("nonzeros", [1, 2, 7, 16, 17])
def test_as_many_nonzeros_as_asked_for(raw: ctypes.CDLL, nonzeros: int) -> None:
    """Up to all of a row."""
    spec = FeedbackSpec("sparse", "procedural", seed=3, nonzeros=nonzeros)
    found = some_entries(raw, spec, 0, 50, 17, None)
    assert (found != 0).sum(1).eq(nonzeros).all()
    make = FEEDBACK_KINDS["sparse"].make
    assert make is not None
    index, sign = make(spec, range(50), 17, CPU)
    assert torch.equal(found, torch.zeros(50, 17).scatter_(1, index.long(), sign.float()))


def test_fill_is_what_kinds_store(raw: ctypes.CDLL) -> None:
    """Guards the tests above: the definition's own entry point gives the same numbers."""
    spec = FeedbackSpec("gaussian", "procedural", seed=9)
    assert torch.equal(some_entries(raw, spec, 5, 4, 10, None), fill(torch.empty(4, 10), "gaussian", 9, row=5))


@pytest.mark.parametrize(("name", "p", "q"), CASES)
def test_slopes_equal_torchs(raw: ctypes.CDLL, name: str, p: float, q: float) -> None:
    """To a few last bits, and at kinks as torch has it."""
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, p, q, -20.0, 20.0, 88.0, -88.0])
    a = torch.cat([edges, torch.linspace(-12, 12, 4001)])
    g, kept = torch.randn(a.shape, generator=torch.Generator().manual_seed(0)), keep((name, p, q), a).contiguous()
    found = torch.empty_like(a)
    number = arguments.ACTIVATIONS[name]
    raw.test_slopes(number, floats(g), floats(kept), ctypes.c_float(p), ctypes.c_float(q), len(a), floats(found))
    wide = ACTIVATIONS[name].gradient(g.double(), kept.double(), float(torch.tensor(p)), float(torch.tensor(q)))
    torch.testing.assert_close(found.double(), wide, rtol=2e-6, atol=2e-6)
    at_kinks = ACTIVATIONS[name].gradient(g[:6], kept[:6], p, q)
    torch.testing.assert_close(found[:6], at_kinks, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_torchs(raw: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Ties, numbers too large or too small for the dtype, and what is no number."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(1))
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    exact = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.9, 65520.0, 2.0**-25, 3 * 2.0**-26])
    between = halves + (halves.abs() * 2.0**-11) * torch.tensor([1.0, -1.0]).repeat(2**15)
    x = torch.cat([bits.to(torch.int32).view(torch.float32), halves, between, exact])
    x = x[: len(x) // 4 * 4]
    one, four = torch.empty_like(x), torch.empty_like(x)
    raw.test_rounded(floats(x), DTYPES[dtype], len(x), floats(one), floats(four))
    expected = x.to(dtype).float()
    for found in (one, four):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(nan=0.0).view(torch.int32), expected.nan_to_num(nan=0.0).view(torch.int32))


@pytest.mark.parametrize("seed", range(40))
def test_the_schedule_covers_every_tile_once(raw: ctypes.CDLL, seed: int) -> None:
    random = Random(seed)
    side, most = random.choice([16, 64, 128]), random.choice([1, 3, 28])
    layers, wanted, tiles = [], set(), []
    for i in range(random.randint(1, most)):
        width_in, width_out = (random.choice([1, 15, 64, 65, 700, 1500]) for _ in range(2))
        weight, bias = random.random() < 0.8, random.random() < 0.7
        down = -(-width_out // side) if weight or bias else 0
        across = -(-width_in // side) if weight else 0
        tiles.append((down, random.randint(1, max(1, across))))
        layers.append(dict(width_in=width_in, width_out=width_out))
        wanted |= {(i, m, n) for m in range(down) for n in range(across or (0 if weight else bias))}
        layers[-1] |= dict(weight=weight)
    programs = 0
    for layer, (down, chunks) in zip(layers, tiles, strict=True):
        layer |= dict(first_program=programs, chunks=chunks)
        programs += down * chunks
    weights = [layer.pop("weight") for layer in layers]
    given = arguments_of(dict(programs=programs), layers)
    for i, weight in enumerate(weights):
        given.tensors[i].weight = int(weight)
    found = (ctypes.c_int * (5 * programs))()
    raw.test_places(ctypes.byref(given), side, side, found)
    seen: list[tuple[int, int, int]] = []
    for at in range(0, 5 * programs, 5):
        i, m, chunk, first, end = found[at : at + 5]
        # The first chunk is the one that sees to the bias.
        columns = range(first, end) if weights[i] else range(chunk == 0)
        seen += [(i, m, n) for n in columns]
        assert (chunk == 0) == (first == 0)
    assert len(seen) == len(set(seen))
    assert set(seen) == wanted


def test_names_have_the_numbers_of_the_header() -> None:
    """Enums are read from the header, so that neither side can move alone."""
    header = (SOURCES / "abi.h").read_text()

    def numbers(enum: str) -> list[str]:
        inside = header.partition(f"enum {enum} {{")[2].partition("}")[0]
        return [name.strip().lower() for name in inside.split(",")]

    assert numbers("DType") == [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    assert numbers("Task") == list(arguments.TASKS)
    assert [name.removesuffix("_seed") for name in numbers("Source")] == list(ORIGINS)
    assert numbers("Activation") == list(arguments.ACTIVATIONS)
    assert set(arguments.ACTIVATIONS) == set(ACTIVATIONS)
    assert numbers("Rule") == list(arguments.RULES)
    assert set(arguments.RULES) == {"store", *RULES}
    assert f"DFA_ABI_VERSION {arguments.ABI_VERSION}\n" in header
    assert f"MOST_LAYERS = {arguments.MOST_LAYERS};" in header


def test_arguments_fit_into_a_kernels() -> None:
    assert ctypes.sizeof(Arguments) <= 4096
    assert host_library()[1].dfa_arguments_bytes() == ctypes.sizeof(Arguments)
