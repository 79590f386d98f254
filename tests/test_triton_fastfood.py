"""Fastfood in a kernel's registers: its diagonals against those of the package, its product against dense algebra."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import triton
import triton.language as tl
from test_fastfood import factor_by_factor
from torch import nn
from triton_cases import DEVICE

import dfa_kernels as dfa
from dfa_kernels.backends.triton.kernels.fastfood_tile import _parts, fastfood_tile
from dfa_kernels.feedback.fastfood import block_rows, fastfood_diagonals
from dfa_kernels.feedback.projection import project_unscaled
from dfa_kernels.feedback.spec import FeedbackSpec

SEEDS = [0, 2**32 + 5, 2**64 - 3]
SIZES = [1, 2, 3, 8, 10, 64, 100, 300, 1000]


@triton.jit
def parts_kernel(sign, source, gaussian, scaling, first_block, key0, key1, N: tl.constexpr, BITS: tl.constexpr):
    parts = _parts(first_block, key0, key1, N, BITS)
    at = tl.arange(0, N)
    tl.store(sign + at, parts[0])
    tl.store(source + at, parts[1])
    tl.store(gaussian + at, parts[2])
    tl.store(scaling + at, parts[3])


@triton.jit
def product_kernel(
    error, stored, out, key0, key1, units, rows, error_size,
    SOURCE: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * R + tl.arange(0, R)
    first = tl.program_id(0) * N
    product = fastfood_tile(
        error, stored, key0, key1, first, units, row, rows, error_size, error_size, 1, SOURCE, N, BITS
    )
    unit = first + tl.arange(0, N)
    inside = (row < rows)[:, None] & (unit < units)[None, :]
    tl.store(out + row[:, None] * units + unit[None, :], product, mask=inside)


def key_words(seed: int) -> tuple[int, int]:
    return tuple(word - 2**32 if word >= 2**31 else word for word in (seed & 0xFFFFFFFF, seed >> 32))


def bits_of(error_size: int) -> int:
    return block_rows(error_size).bit_length() - 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("error_size", SIZES)
@pytest.mark.parametrize("first_block", [0, 7])
def test_the_parts_are_those_that_dense_storage_keeps(seed, error_size, first_block):
    """To the bit."""
    d = block_rows(error_size)
    blocks = max(1, 64 // d)
    found = [torch.full((blocks * d,), -99, dtype=dtype, device=DEVICE) for dtype in (torch.int8, torch.int32)]
    found += [torch.full((blocks * d,), math.nan, device=DEVICE) for _ in range(2)]
    parts_kernel[(1,)](*found, first_block, *key_words(seed), blocks * d, bits_of(error_size))
    kept = fastfood_diagonals(seed, range(first_block, first_block + blocks), error_size, torch.device("cpu"))
    signs, source, gaussian, scaling = (part.cpu().view(blocks, d) for part in found)
    for part, expected in zip((signs, source, gaussian, scaling), kept, strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("source", ["fastfood", "fastfood_seed"])
@pytest.mark.parametrize(
    ("error_size", "units"), [(1, 5), (2, 9), (3, 40), (10, 100), (64, 300), (100, 500), (600, 1500)]
)
def test_the_product_is_the_factors(source, error_size, units):
    seed, batch, tile = 2**63 + 12345, 5, max(64, block_rows(error_size))
    error = torch.randn(batch, error_size, generator=torch.Generator().manual_seed(units))
    kept = fastfood_diagonals(seed, range(-(-units // block_rows(error_size))), error_size, torch.device("cpu"))
    out = torch.full((batch, units), math.nan, device=DEVICE)
    stored = tuple(part.to(DEVICE) for part in kept) if source == "fastfood" else (error.to(DEVICE),)
    product_kernel[(-(-units // tile), -(-batch // 2))](
        error.to(DEVICE), stored, out, *key_words(seed), units, batch, error_size, source, 2, tile, bits_of(error_size)
    )
    exact = factor_by_factor(error.double(), kept)[:, :units]
    plain = project_unscaled(error, kept, FeedbackSpec("fastfood"), units)
    assert (out.cpu() - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("storage", ["dense", "procedural"])
def test_float16_feedback_of_a_large_error(storage):
    """Before it is scaled the projection reaches 10^5, more than float16 holds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 1000)).to(DEVICE)
    x = torch.randn(2, 4, device=DEVICE)
    grads = []
    for backend in ("torch", "triton"):
        model = dfa.DFA(copy.deepcopy(net), dfa.Feedback("fastfood", storage, dtype=torch.float16), backend=backend)
        (model(x) * 5000).sum().backward()
        grads.append(model.net[0].weight.grad)
    assert grads[1].isfinite().all()
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=2e-3 * float(grads[0].abs().max()))
