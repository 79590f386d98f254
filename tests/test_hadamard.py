"""The Walsh-Hadamard transform against scipy, and as an operator."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from dfa_kernels.functional import hadamard_transform


def reference(x: torch.Tensor, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    n = x.shape[-1]
    d = 1 << (n - 1).bit_length()
    h = torch.from_numpy(hadamard(d)).to(dtype)
    return (F.linear(F.pad(x.to(dtype), (0, d - n)), h) * scale)[..., :n]


def within_baseline(got: torch.Tensor, x: torch.Tensor, scale: float) -> bool:
    exact = reference(x, scale)
    baseline = (reference(x, scale, x.dtype).double() - exact).abs().max()
    return bool((got.double() - exact).abs().max() <= 2 * baseline + torch.finfo(x.dtype).tiny)


@pytest.mark.parametrize("n", [2**k for k in range(13)] + [3, 7, 10, 33, 100, 1000, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integers_transform_exactly(n, dtype):
    x = torch.randint(-8, 9, (3, n), generator=torch.Generator().manual_seed(n)).to(dtype)
    assert torch.equal(hadamard_transform(x).double(), reference(x))
    assert torch.equal(hadamard_transform(x, 0.5).double(), reference(x, 0.5))


@pytest.mark.parametrize("n", [1, 2, 31, 64, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_within_the_baselines(n, dtype):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    assert within_baseline(hadamard_transform(x, n**-0.5), x, n**-0.5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3), st.integers(1, 70), st.booleans())
def test_any_shape_and_stride(leading, n, transposed):
    x = torch.randint(-8, 9, (*leading, n)).double()
    if transposed and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(hadamard_transform(x), reference(x))


@pytest.mark.parametrize("n", [1, 4, 6])
def test_result_shares_nothing_with_the_input(n):
    x = torch.ones(2, n)
    result = hadamard_transform(x)
    result.zero_()
    assert torch.equal(x, torch.ones(2, n))


@pytest.mark.parametrize("n", [1, 5, 8])
def test_every_mode_of_differentiation(n):
    x, v = torch.randn(2, 3, n, dtype=torch.float64).unbind(0)
    expected = reference(v, 0.7)

    def f(x):
        return hadamard_transform(x, 0.7)

    torch.testing.assert_close(torch.func.jvp(f, (x,), (v,))[1], expected)
    torch.testing.assert_close(torch.func.vjp(f, x)[1](v)[0], expected)
    torch.testing.assert_close(torch.func.vmap(f)(v), expected)
    torch.testing.assert_close(torch.func.vmap(f, in_dims=1, out_dims=1)(v.T), expected.T)
    matrix = reference(torch.eye(n, dtype=torch.float64), 0.7)
    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        torch.testing.assert_close(jacobian(f)(x[0]), matrix)
    torch.testing.assert_close(torch.func.hessian(lambda x: f(x).square().sum() / 2)(x[0]), matrix @ matrix)
    x.requires_grad_()
    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(f, (x,), **checks)
    assert torch.autograd.gradgradcheck(lambda x: f(x).square(), (x,), check_fwd_over_rev=True)


def test_compiles_whole():
    x = torch.randn(3, 6, requires_grad=True)
    compiled = torch.compile(lambda x: hadamard_transform(x * 2, 0.5).sum(), fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    torch.testing.assert_close(x.grad, reference(torch.ones(3, 6)).float())


@pytest.mark.parametrize("n", [5, 8])
def test_compiles_whole_in_forward_mode(n):
    x, v = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)

    def tangent(x, v):
        return torch.func.jvp(lambda x: hadamard_transform(x, 0.7), (x,), (v,))[1]

    def jacobian(x):
        return torch.func.jacfwd(lambda x: hadamard_transform(x, 0.7))(x)

    def compiled(f):
        return torch.compile(f, fullgraph=True, backend="aot_eager")

    torch.testing.assert_close(compiled(tangent)(x, v), reference(v, 0.7))
    torch.testing.assert_close(compiled(jacobian)(x), reference(torch.eye(n, dtype=torch.float64), 0.7))


@pytest.mark.parametrize("shape", [(3, 8), (5,), (2, 3, 6), (0, 4), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_operator_is_well_formed(shape, dtype):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.dfa_kernels.hadamard.default, (x, 0.5))
    torch.library.opcheck(torch.ops.dfa_kernels.hadamard.default, (x.detach().repeat_interleave(2, -1)[..., ::2], 0.5))


def test_autocast_does_not_lower_the_precision():
    x = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hadamard_transform(x), hadamard_transform(x.clone()))
        inside = hadamard_transform(x)
    assert torch.equal(inside, hadamard_transform(x))


def test_orthogonality():
    x = torch.randn(3, 256, dtype=torch.float64)
    back = hadamard_transform(hadamard_transform(x, 1 / 16), 1 / 16)
    assert (back - x).abs().max() < 64 * math.ulp(4.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_input_must_be_floating(dtype):
    with pytest.raises(TypeError, match=f"x must be a floating tensor, got {dtype}"):
        hadamard_transform(torch.ones(4).to(dtype))


def test_input_must_be_a_tensor():
    with pytest.raises(TypeError, match="x must be a floating tensor, got list"):
        hadamard_transform([1.0, 2.0])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_input_must_have_a_last_dimension(shape):
    with pytest.raises(ValueError, match="x must have a last dimension of at least 1"):
        hadamard_transform(torch.ones(shape))
