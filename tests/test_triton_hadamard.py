"""The Walsh-Hadamard transform as a Triton kernel, against scipy; without a GPU it is interpreted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close_to_oracle
from scipy.linalg import hadamard as matrix
from triton_cases import DEVICE, in_nans, watched

from dfa_kernels.backends import torch_backend, triton
from dfa_kernels.backends.triton import transform
from dfa_kernels.backends.triton.launch import target_of
from dfa_kernels.backends.triton.transform import LARGEST_TRANSFORM, programs_ahead, tile_of


def reference(x: torch.Tensor, scale: float) -> torch.Tensor:
    n = x.shape[-1]
    d = 1 << (n - 1).bit_length()
    H = torch.from_numpy(matrix(d)).double()
    return (F.linear(F.pad(x.cpu().double(), (0, d - n)), H) * scale)[..., :n]


@pytest.mark.parametrize("n", [*[2**k for k in range(14)], 3, 7, 10, 33, 100, 1000, 1025])
def test_whole_numbers_transform_exactly_in_one_launch(n):
    """Sums of small whole numbers are exact in float32, so every sign and every place is seen."""
    x = in_nans(torch.randint(-8, 9, (5, n), generator=torch.Generator().manual_seed(n)).float())
    with watched() as seen:
        out = triton.hadamard(x, 0.5)
    assert seen.kernels == ["hadamard_kernel"]
    assert torch.equal(out.cpu().double(), reference(x, 0.5))


@pytest.mark.parametrize("n", [16384, 20000, LARGEST_TRANSFORM])
def test_the_largest_are_those_of_the_composed_transform(n):
    x = torch.randint(-8, 9, (2, n), generator=torch.Generator().manual_seed(n)).float().to(DEVICE)
    with watched() as seen:
        out = triton.hadamard(x)
    assert seen.kernels == ["hadamard_kernel"]
    assert torch.equal(out, torch_backend.hadamard(x))


@pytest.mark.parametrize("n", [33, 256])
def test_programs_that_load_rows_ahead(n, monkeypatch):
    """Fewer programs than blocks of rows, and a last block that is not full."""
    monkeypatch.setattr(transform, "programs_ahead", lambda length, dtype, capability: 1)
    most = target_of(torch.device(DEVICE)).multiprocessors * tile_of(1 << (n - 1).bit_length())[1]
    x = in_nans(torch.randint(-8, 9, (2 * most + 3, n), generator=torch.Generator().manual_seed(n)).float())
    with watched() as seen:
        out = triton.hadamard(x, 0.5)
    assert seen.kernels == ["hadamard_kernel"]
    assert torch.equal(out.cpu().double(), reference(x, 0.5))


def test_long_rows_are_loaded_ahead_where_registers_and_shared_memory_allow():
    float32, bfloat16 = torch.float32, torch.bfloat16
    assert [programs_ahead(n, bfloat16, 90) for n in (8192, 16384, 32768)] == [0, 2, 1]
    assert [programs_ahead(n, float32, 90) for n in (8192, 16384, 32768)] == [0, 0, 1]
    assert [programs_ahead(32768, dtype, 80) for dtype in (bfloat16, float32)] == [1, 0]
    assert [programs_ahead(32768, dtype, 86) for dtype in (bfloat16, float32)] == [0, 0]


def test_beyond_the_largest_the_transform_is_composed():
    x = torch.randint(-8, 9, (2, LARGEST_TRANSFORM + 1)).float().to(DEVICE)
    with watched() as seen:
        out = triton.hadamard(x, 2.0)
    assert seen.kernels == []
    assert torch.equal(out, torch_backend.hadamard(x, 2.0))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3), st.integers(1, 70), st.booleans())
def test_any_shape_and_stride(leading, n, transposed):
    x = torch.randn(*leading, n, device=DEVICE)
    if transposed and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    with watched():
        out = triton.hadamard(x, n**-0.5)
    assert out.shape == x.shape
    if x.numel():
        same = torch_backend.hadamard(x, n**-0.5)
        assert_close_to_oracle(out.cpu(), reference(x, n**-0.5), same.cpu(), float(x.abs().max()) * n**0.5, "Hx")


# The interpreter cuts off what bfloat16 should round.
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_half_precision_is_summed_in_float32(dtype):
    """To the last bit: the sums are exact, so only the last rounding is left."""
    x = torch.randint(-8, 9, (3, 256), generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    out = triton.hadamard(x, 1 / 3)
    exact = reference(x.float(), 1.0).float() * (1 / 3)
    assert out.dtype == dtype
    assert torch.equal(out.cpu(), exact.to(dtype))


def test_float64_is_composed():
    x = torch.randn(3, 8, dtype=torch.float64, device=DEVICE)
    with watched() as seen:
        assert torch.equal(triton.hadamard(x), torch_backend.hadamard(x))
    assert seen.kernels == []


def test_the_result_shares_nothing_with_the_input():
    x = torch.ones(2, 1, device=DEVICE)
    triton.hadamard(x).zero_()
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize("bits", range(16))
def test_a_program_has_at_least_a_row(bits):
    warps, rows = tile_of(2**bits)
    assert rows >= 1
    assert 1 <= warps <= 32
    assert rows * 2**bits == 32 * 32 * warps
