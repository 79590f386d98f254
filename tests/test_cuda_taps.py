"""`project_taps` as CUDA C++, against the formulas: csrc's own kernel, run thread by thread on a CPU."""

from __future__ import annotations

from random import Random

import pytest
import torch
from cuda_host import needs_a_compiler, on_host
from hypothesis import given, note, settings
from test_triton_taps import ORDERS, SHAPES, TapCase, Taps, plain_call, some_tap
from torch import Tensor
from triton_cases import (
    BATCHES,
    CASES,
    DEVICE,
    ERROR_SIZES,
    FEEDBACKS,
    FRESH,
    LARGE_ERROR_SIZES,
    LAYOUTS,
    Poison,
    feedback_of,
    lay_error,
    margins_are_nan,
    randoms,
    some_feedback,
)

import dfa_kernels as dfa
from dfa_kernels.backends import cuda, torch_backend
from dfa_kernels.backends.csrc.arguments import MOST_LAYERS

pytestmark = [
    needs_a_compiler,
    pytest.mark.skipif(DEVICE.type == "cuda", reason="tensors are on the GPU, where test_gpu_cuda.py runs the kernels"),
]


def run(call: Taps, calls: int = 1, backwards: bool = False) -> list[Tensor]:
    """Every δ."""
    with on_host(backwards=backwards) as ran, Poison() as poison:
        found = cuda.project_taps(call.arguments())
    assert ran == ["taps"] * calls
    assert all(margins_are_nan(view) for view in poison.made)
    return found


@settings(**FRESH, max_examples=60)
@given(random=randoms)
def test_any_taps(random: Random) -> None:
    cases = [some_tap(random) for _ in range(random.randint(1, 4))]
    error_size, rows = random.choice(ERROR_SIZES + LARGE_ERROR_SIZES), random.choice(BATCHES)
    layout, options = random.choice([*LAYOUTS, "one row", "one number"]), some_feedback(random)
    torch.manual_seed(random.randrange(10**6))
    note(f"{cases} {rows} rows, E={error_size}, {layout}, {options}")
    error = lay_error(torch.randn(rows, error_size), layout)
    call = Taps(cases, feedback_of(options, error_size), error, torch.float32)
    call.check(run(call))


def test_every_activation() -> None:
    cases = [
        TapCase(SHAPES[i % len(SHAPES)], case, ORDERS[i % 2], ORDERS[i // 2 % 3] if i % 2 else None)
        for i, case in enumerate(CASES)
    ]
    call = plain_call(cases)
    call.check(run(call))


@pytest.mark.parametrize("place", FEEDBACKS, ids="-".join)
def test_every_feedback(place: tuple[str, str]) -> None:
    cases = [TapCase((35,)), TapCase((3, 2, 2), ("tanh", 0.0, 0.0), "channels_last"), TapCase((141,))]
    call = plain_call(cases, place, rows=70, error_size=130)
    found = run(call)
    call.check(found)
    for a, b in zip(run(call, backwards=True), found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_order", ORDERS)
@pytest.mark.parametrize("units", [(6, 3, 5), (6, 7), (2, 3, 2, 2)], ids=str)
def test_orders_in_memory(order: str, mask_order: str, units: tuple[int, ...]) -> None:
    """Unit u is element u of [C, …], wherever it lies; δ lies as what was saved does."""
    call = plain_call([TapCase(units, ("gelu", 0.0, 0.0), order, mask_order)], rows=4)
    (found,) = run(call)
    call.check([found])
    (saved,) = call.saved
    assert saved is not None
    assert found.stride() == (saved.stride() if order == "channels_last" else saved.contiguous().stride())


def test_more_taps_than_a_call_of_the_library_takes() -> None:
    call = plain_call([TapCase((3 + i,)) for i in range(2 * MOST_LAYERS + 1)])
    call.check(run(call, calls=3))
    with on_host():
        assert cuda.describe_taps(call.arguments(), DEVICE).count("one launch of CUDA C++") == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("error_dtype", ["the same", "float32"])
def test_activations_in_half_precision(dtype: torch.dtype, error_dtype: str) -> None:
    torch.manual_seed(0)
    cases = [TapCase((33,), ("tanh", 0.0, 0.0), "contiguous", "contiguous"), TapCase((64,), CASES[2]), TapCase((75,))]
    error = torch.randn(17, 19, dtype=dtype if error_dtype == "the same" else torch.float32)
    call = Taps(cases, dfa.Feedback(seed=3), lay_error(error, "plain"), dtype)
    call.check(run(call))


def test_float64_is_left_to_the_torch_backend() -> None:
    torch.manual_seed(0)
    call = Taps([TapCase((33,))], dfa.Feedback(), torch.randn(5, 7, dtype=torch.float64), torch.float64)
    (found,) = run(call, calls=0)
    assert torch.equal(found, torch_backend.project_taps(call.arguments())[0])
    with on_host():
        assert cuda.describe_taps(call.arguments(), DEVICE).startswith("by the torch backend: ")


def test_empty_batch() -> None:
    call = plain_call([TapCase((7,)), TapCase((3, 2, 2), ("tanh", 0.0, 0.0), "channels_last", "contiguous")], rows=0)
    assert [tuple(delta.shape) for delta in run(call)] == [(0, 7), (0, 3, 2, 2)]
