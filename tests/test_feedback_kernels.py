"""`Feedback.project` where the operator has kernels; without a GPU they are interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from oracle import assert_close_to_oracle
from torch import Tensor
from triton_cases import DEVICE, watched

from dfa_kernels import ops
from dfa_kernels.backends import triton as triton_backend
from dfa_kernels.backends.calls import TapsCall
from dfa_kernels.feedback import Feedback, projection
from dfa_kernels.feedback.spec import KINDS, STORAGES

each_form = pytest.mark.parametrize(("kind", "storage"), [(kind, storage) for kind in KINDS for storage in STORAGES])


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreted kernels as the operator's on a CPU."""
    if torch.cuda.is_available():
        yield
        return
    monkeypatch.setattr(projection, "_may_have_kernels", lambda device: True)
    with torch.library._scoped_library("dfa_kernels", "IMPL") as library:
        library.impl("project_taps", ops._gathered(triton_backend.project_taps, TapsCall), "CPU")
        yield


def randn(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), **options).to(DEVICE)


def assert_projected(found: Tensor, error: Tensor, feedback: Feedback) -> None:
    b = feedback.matrix(found.shape[-1], error.shape[-1], device=error.device)
    exact = error.double() @ b.double().T
    assert (found.shape, found.dtype, found.device) == (exact.shape, error.dtype, error.device)
    assert_close_to_oracle(found, exact, (error.to(b.dtype) @ b.T).to(error.dtype), 1.0)


def is_one_product(kind: str, storage: str) -> bool:
    return kind in ("gaussian", "uniform") and storage == "dense"


@each_form
def test_one_launch_or_one_product(kind: str, storage: str) -> None:
    feedback, error = Feedback(kind, storage, seed=2**40 + 3, gain=1.5), randn(9, 37)
    with watched() as seen:
        found = feedback.project(error, 301)
    assert seen.kernels == ["project_taps_kernel"] * (not is_one_product(kind, storage))
    assert_projected(found, error, feedback)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (0, 7), (2, 0, 7)])
@pytest.mark.parametrize("kind", ["rademacher", "fastfood"])
def test_any_leading_shape(kind: str, shape: tuple[int, ...]) -> None:
    feedback, error = Feedback(kind, "procedural"), randn(*shape[:-1], 14)[..., ::2]
    assert_projected(feedback.project(error, 21), error, feedback)


@pytest.mark.parametrize("feedback_dtype", [torch.float32, torch.float64])
def test_float64_goes_by_torch(feedback_dtype: torch.dtype) -> None:
    feedback, error = Feedback("rademacher", "procedural", dtype=feedback_dtype), randn(5, 33, dtype=torch.float64)
    with watched() as seen:
        found = feedback.project(error, 60)
    assert seen.kernels == []
    torch.testing.assert_close(found, error @ feedback.matrix(60, 33, device=DEVICE).double().T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["rademacher", "fastfood"])
def test_autocast_does_not_lower_the_precision(kind: str) -> None:
    feedback, error = Feedback(kind, "procedural"), randn(4, 20)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = feedback.project(error, 30)
    assert torch.equal(inside, feedback.project(error, 30))


def test_it_has_no_derivative() -> None:
    assert not Feedback("rademacher").project(randn(3, 20).requires_grad_(), 30).requires_grad


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "fastfood"])
def test_forward_mode(kind: str) -> None:
    """The derivative of a linear function is the function."""
    feedback, error, tangent = Feedback(kind, "procedural"), randn(3, 20), randn(3, 20).roll(1)
    with forward_ad.dual_level():
        dual = feedback.project(forward_ad.make_dual(error, tangent), 30)
        found = forward_ad.unpack_dual(dual).tangent
    assert found is not None
    torch.testing.assert_close(found, feedback.project(tangent, 30))
    _, also = torch.func.jvp(lambda e: feedback.project(e, 30), (error,), (tangent,))
    torch.testing.assert_close(also, found)


def test_vmap() -> None:
    feedback, errors = Feedback(), randn(2, 3, 20)
    found = torch.func.vmap(lambda e: feedback.project(e, 30))(errors)
    torch.testing.assert_close(found, feedback.project(errors, 30))


@pytest.mark.parametrize("kind", ["rademacher", "fastfood"])
def test_compiled(kind: str) -> None:
    feedback, error = Feedback(kind, "procedural"), randn(3, 20)
    compiled = torch.compile(lambda e: feedback.project(e * 2, 30), fullgraph=True)
    with watched() as seen:
        found = compiled(error)
    assert seen.kernels == ["project_taps_kernel"]
    assert torch.equal(found, feedback.project(error * 2, 30))
