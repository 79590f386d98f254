"""`project_taps` as a Triton kernel, against the formulas; without a GPU it is interpreted."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from random import Random

import pytest
import torch
from hypothesis import given, note, settings
from oracle import Layer, assert_close_to_oracle, tap_delta
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
    PROJECTIONS,
    feedback_of,
    guarded,
    in_64_bits,
    keep,
    lay_error,
    randoms,
    scaled,
    some_feedback,
    watched,
)

import dfa_kernels as dfa
from dfa_kernels.backends import torch_backend
from dfa_kernels.backends import triton as triton_backend
from dfa_kernels.backends.calls import TapsCall
from dfa_kernels.backends.triton import plan_taps as plan
from dfa_kernels.backends.triton.problem import TapsProblem
from dfa_kernels.backends.triton.route import planned_by

IDENTITY = ("identity", 0.0, 0.0)
SHAPES = [(1,), (7,), (33,), (127,), (200,), (3, 5, 5), (8, 3, 4), (16, 2, 2), (1, 4, 4), (5, 11), (7, 2), (3, 2, 3, 2)]
ORDERS = ["contiguous", "channels_last", "strided"]


@dataclass
class TapCase:
    """One tap: its shape without the rows, and what is saved of its pre-activation, if anything."""

    units: tuple[int, ...]
    case: tuple[str, float, float] | None = None
    order: str = "contiguous"
    mask_order: str | None = None


def in_order(tensor: Tensor, order: str) -> Tensor:
    """The same values in another order in memory, with NaN around and between them."""
    tensor = tensor.to(DEVICE)
    if order == "channels_last" and tensor.dim() > 2:
        last = tensor.movedim(1, -1)
        strides = last.contiguous().stride()
        return guarded(tuple(last.shape), strides, tensor.dtype)[1].copy_(last).movedim(-1, 1)
    wide = (*tensor.shape[:-1], tensor.shape[-1] * (2 if order == "strided" else 1))
    memory = guarded(wide, torch.empty(wide, device="meta").stride(), tensor.dtype)[1]
    return memory[..., :: 2 if order == "strided" else 1].copy_(tensor)


class Taps:
    """One call of `project_taps`, and what the formulas say of it."""

    def __init__(self, cases: list[TapCase], feedback: dfa.Feedback, error: Tensor, dtype: torch.dtype) -> None:
        self.cases, self.feedback, self.error = cases, feedback, error
        rows = error.shape[0]
        self.pre = [torch.randn(rows, *tap.units, dtype=dtype) for tap in cases]
        self.saved = [
            None if tap.case is None else in_order(keep(tap.case, a), tap.order)
            for tap, a in zip(cases, self.pre, strict=True)
        ]
        self.masks = [
            None if tap.mask_order is None else in_order(torch.randint(2, a.shape).to(dtype) * 1.25, tap.mask_order)
            for tap, a in zip(cases, self.pre, strict=True)
        ]
        self.sizes = [math.prod(tap.units) for tap in cases]

    def arguments(self) -> TapsCall:
        stored = self.feedback.stored(max(self.sizes), self.error.shape[1], DEVICE)
        used = [tap.case or IDENTITY for tap in self.cases]
        numbers = [number for case in used for number in case[1:]]
        names = [case[0] for case in used]
        return TapsCall(self.error, stored, self.feedback.spec, self.sizes, self.saved, self.masks, names, numbers)

    def check(self, found: list[Tensor]) -> None:
        same = torch_backend.project_taps(self.arguments())
        for i, (out, torchs) in enumerate(zip(found, same, strict=True)):
            ref, scale = self._reference(i)
            saved = self.saved[i]
            assert out.dtype == (self.error.dtype if saved is None else saved.dtype)
            assert_close_to_oracle(out.cpu(), ref, torchs.cpu(), scale, f"tap {i}")

    def _reference(self, i: int) -> tuple[Tensor, float]:
        saved, mask, e = self.saved[i], self.masks[i], self.error.cpu().double()
        B = scaled(self.feedback, self.sizes[i], e.shape[1])
        case = self.cases[i].case
        mask64 = None if mask is None or saved is None else mask.cpu().double()
        layer = Layer(e, None, *(case or IDENTITY), mask64)
        a = self.pre[i].double() if saved is not None else e.new_empty(e.shape[0], self.sizes[i]).fill_(1)
        delta, size = tap_delta(layer, a, e, B, True)
        return delta, float(size.max()) if size.numel() else 0.0


def tiles(config: plan.ProjectionConfig | None) -> AbstractContextManager[None]:
    """`project_taps` with these tiles."""
    if config is None:
        return nullcontext()
    return planned_by(lambda problem, target: plan.plan_projection(problem, config), TapsProblem)


def run(call: Taps, config: plan.ProjectionConfig | None = PROJECTIONS[0]) -> list[Tensor]:
    """Every δ, made by one launch."""
    with tiles(config), watched() as seen:
        found = triton_backend.project_taps(call.arguments())
    assert seen.kernels == ["project_taps_kernel"] * (call.error.shape[0] > 0)
    return found


def some_tap(random: Random) -> TapCase:
    saved = random.random() < 0.7
    return TapCase(
        random.choice(SHAPES),
        random.choice(CASES) if saved else None,
        random.choice(ORDERS),
        random.choice(ORDERS) if saved and random.random() < 0.4 else None,
    )


def plain_call(
    cases: list[TapCase], place: tuple[str, str] = ("gaussian", "dense"), rows: int = 17, error_size: int = 19
) -> Taps:
    torch.manual_seed(0)
    options = {"place": place, "seed": 2**33 + 1, "normalize": True, "gain": 1.0, "nonzeros": None}
    error = lay_error(torch.randn(rows, error_size), "plain")
    return Taps(cases, feedback_of(options, error_size), error, torch.float32)


@settings(**FRESH, max_examples=40)
@given(random=randoms)
def test_any_taps(random: Random) -> None:
    cases = [some_tap(random) for _ in range(random.randint(1, 4))]
    error_size, rows = random.choice(ERROR_SIZES + LARGE_ERROR_SIZES), random.choice(BATCHES)
    layout, options = random.choice([*LAYOUTS, "one row", "one number"]), some_feedback(random)
    torch.manual_seed(random.randrange(10**6))
    note(f"{cases} {rows} rows, E={error_size}, {layout}, {options}")
    error = lay_error(torch.randn(rows, error_size), layout)
    call = Taps(cases, feedback_of(options, error_size), error, torch.float32)
    widest = max(call.sizes) * rows
    call.check(run(call, PROJECTIONS[random.randrange(3)] if widest < 2000 else PROJECTIONS[2]))


@pytest.mark.parametrize("first", range(0, len(CASES), 6))
def test_every_activation(first: int) -> None:
    cases = [
        TapCase(SHAPES[i + 2], case, ORDERS[i % 2], ORDERS[i // 2] if i % 2 else None)
        for i, case in enumerate(CASES[first : first + 6])
    ]
    call = plain_call(cases)
    call.check(run(call, PROJECTIONS[2]))


@pytest.mark.parametrize("place", FEEDBACKS, ids="-".join)
def test_every_feedback(place: tuple[str, str]) -> None:
    """Errors of several tiles, several words of packed signs and several Philox calls."""
    cases = [TapCase((35,)), TapCase((3, 2, 2), ("tanh", 0.0, 0.0), "channels_last"), TapCase((41,))]
    call = plain_call(cases, place, rows=5, error_size=130)
    call.check(run(call))


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


@pytest.mark.parametrize("channels, place", [(1, 1), (4, 1), (1, 6)], ids=str)
def test_orders_that_are_two_at_once(channels: int, place: int) -> None:
    """With one channel or one place both orders are the same, whatever the strides say."""
    case = TapCase((channels, place, 1), ("tanh", 0.0, 0.0))
    call = plain_call([case, TapCase((12,))])
    (saved, _) = call.saved
    assert saved is not None
    call.saved[0] = saved.contiguous(memory_format=torch.channels_last)
    call.check(run(call))


@pytest.mark.parametrize("config", PROJECTIONS, ids=str)
def test_the_same_bits_again(config: plan.ProjectionConfig) -> None:
    cases = [TapCase((33,)), TapCase((3, 5, 5), ("gelu", 0.0, 0.0), "channels_last", "contiguous")]
    call = plain_call(cases, ("gaussian", "procedural"))
    for a, b in zip(run(call, config), run(call, config), strict=True):
        assert torch.equal(a, b)


def test_empty_batch() -> None:
    call = plain_call([TapCase((7,)), TapCase((3, 2, 2), ("tanh", 0.0, 0.0), "channels_last", "contiguous")], rows=0)
    found = run(call)
    assert [tuple(delta.shape) for delta in found] == [(0, 7), (0, 3, 2, 2)]


def test_tiles_of_the_package() -> None:
    call = plain_call([TapCase((200,), ("relu", 0.0, 0.0)), TapCase((3, 5, 5))])
    call.check(run(call, None))


def test_activations_in_half_precision() -> None:
    torch.manual_seed(0)
    cases = [TapCase((33,), ("tanh", 0.0, 0.0), "contiguous", "contiguous"), TapCase((3, 5, 5))]
    for error_dtype in (torch.float32, torch.float16):
        error = lay_error(torch.randn(17, 19, dtype=error_dtype), "plain")
        call = Taps(cases, dfa.Feedback(seed=3), error, torch.float16)
        call.check(run(call))


def test_float64_is_left_to_the_torch_backend() -> None:
    torch.manual_seed(0)
    call = Taps([TapCase((33,))], dfa.Feedback(), torch.randn(5, 7, dtype=torch.float64, device=DEVICE), torch.float64)
    with watched() as seen:
        found = triton_backend.project_taps(call.arguments())
    assert seen.kernels == []
    assert torch.equal(found[0], torch_backend.project_taps(call.arguments())[0])


# The entries of kind "uniform" are products of int32 by themselves.
@pytest.mark.parametrize("place", [place for place in FEEDBACKS if place != ("uniform", "procedural")], ids="-".join)
def test_offsets_in_int64_give_the_same_bits(place: tuple[str, str]) -> None:
    cases = [TapCase((35,)), TapCase((3, 2, 2), ("tanh", 0.0, 0.0), "channels_last", "contiguous")]
    call = plain_call(cases, place)
    expected = run(call, PROJECTIONS[1])
    with in_64_bits():
        found = run(call, PROJECTIONS[1])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
