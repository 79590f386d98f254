"""`layer_grads` and `layer_update_` in one call of C++ on a CPU, against the formulas; and what is left to torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from cpu_host import fresh_library, installed
from cuda_host import needs_a_compiler
from hypothesis import given, note, settings
from oracle import assert_close_to_oracle
from test_triton_update import LAYERS, MOMENTUM, RULES, SOME, STATE, Training, calls_of, operator_rule, train
from test_triton_update import check as check_update
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import (
    CASES,
    DEVICE,
    FEEDBACKS,
    FRESH,
    Call,
    Poison,
    make_call,
    margins_are_nan,
    plain_layer,
    plain_network,
    randoms,
    some_network,
)

import dfa_kernels as dfa
from dfa_kernels import backends
from dfa_kernels.backends import cpu, torch_backend
from dfa_kernels.backends.cpu import operators
from dfa_kernels.backends.cpu.library import load
from dfa_kernels.backends.csrc.arguments import MOST_LAYERS, Arguments
from dfa_kernels.backends.csrc.opened import LibraryError

pytestmark = [
    needs_a_compiler,
    pytest.mark.skipif(DEVICE.type == "cuda", reason="tensors are on the GPU"),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    with installed(fresh_library(), most=2**60):
        yield


def run(call: Call, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The gradients, by the library."""
    assert "one call of C++" in cpu.describe_layers(call.arguments(), dtype, "store", CPU)
    with by_the_library(), Poison() as poison:
        found = cpu.layer_grads(call.arguments(), dtype)
    assert all(margins_are_nan(view) for view in poison.made)
    return found


@contextmanager
def by_the_library(calls: int = 1) -> Iterator[None]:
    """So many calls are the library's, and nothing is torch's."""
    with mock.patch.object(operators, "_run", wraps=operators._run) as ran:
        yield
    assert ran.call_count == calls


def check(call: Call, found: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """As near to the formulas in float64 as the torch backend."""
    same = torch_backend.layer_grads(call.arguments(), dtype)
    for (name, ref, scale), out, torchs in zip(call.wanted_gradients(), found, same, strict=True):
        assert out.dtype == dtype
        assert_close_to_oracle(out, ref, torchs, scale, name)


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@settings(**FRESH, max_examples=200)
@given(random=randoms)
def test_any_network(random: Random) -> None:
    network = some_network(random, "two_phase")
    note(str(network))
    call = make_call(network)
    if any(call.wanted[0] + call.wanted[1]):
        check(call, run(call))


def test_every_activation() -> None:
    call = make_call(plain_network([plain_layer(case, mask=i % 3 == 0) for i, case in enumerate(CASES)]))
    check(call, run(call))


@pytest.mark.parametrize("place", FEEDBACKS, ids="-".join)
@pytest.mark.parametrize("most", [0, 2**60], ids=["much of U is stored", "little"])
def test_every_feedback(place: tuple[str, str], most: int) -> None:
    """If much is stored, torch makes the projection."""
    layers = [plain_layer(width_out=35), plain_layer(positions=2), plain_layer(width_out=17)]
    network = plain_network(layers, error_size=130)
    network["feedback"].update(place=place, gain=-0.5, seed=2**40 + 3)
    by_torch = place[0] == "fastfood" or (place[1] == "dense" and most == 0)
    for normalize in (True, False):
        network["feedback"].update(normalize=normalize)
        call = make_call(network)
        with (
            installed(fresh_library(), 2**60, most),
            mock.patch.object(torch_backend, "shared_projection", wraps=torch_backend.shared_projection) as made,
        ):
            found = run(call)
        assert made.call_count == by_torch
        check(call, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "uniform", "sparse"])
def test_feedback_in_another_precision(dtype: torch.dtype, kind: str) -> None:
    """Entries are rounded to it, in memory and when made anew."""
    call = make_call(plain_network([plain_layer(), plain_layer(width_out=17)]))
    for storage in ("dense", "procedural"):
        call.feedback = dfa.Feedback(kind, storage, seed=2**40 + 3, dtype=dtype)
        check(call, run(call))


@pytest.mark.parametrize("rows", [0, 1, 31, 33])
def test_batches_of_any_size(rows: int) -> None:
    call = make_call(plain_network([plain_layer(mask=True), plain_layer(width_in=64, width_out=64)], rows=rows))
    check(call, run(call))


def test_the_same_bits_on_every_processor() -> None:
    """With vectors of eight numbers and of four."""
    layers = [plain_layer(width_in=67, width_out=41), plain_layer(("gelu", 0.0, 0.0), positions=2, mask=True)]
    call = make_call(plain_network(layers, rows=19, error_size=33))
    first = run(call)
    with installed(fresh_library("-DDFA_FOR_ANY_PROCESSOR"), most=2**60):
        assert_same(run(call), first)


def test_some_gradients_wanted() -> None:
    wanted = ([True, False, False, False, True], [True, False, True, False, False])
    call = make_call(plain_network([plain_layer(width_in=20, width_out=14) for _ in range(4)], wanted=wanted))
    check(call, run(call))


def test_no_gradient_wanted() -> None:
    call = make_call(plain_network([plain_layer()], wanted=([False] * 2, [False] * 2)))
    assert cpu.layer_grads(call.arguments(), torch.float32) == []


def test_an_output_layer_alone() -> None:
    call = make_call(plain_network([], error_size=70))
    check(call, run(call))


def test_every_gradient_has_its_own_memory() -> None:
    """So that torch.optim may change them in place."""
    call = make_call(plain_network(LAYERS))
    found = run(call)
    for gradient in found[1:]:
        gradient.fill_(torch.nan)
    check(call, [found[0], *run(call)[1:]])


@pytest.mark.parametrize(("rule", "groups"), RULES.values(), ids=RULES)
def test_every_rule(rule: str, groups: list[dict[str, Any]]) -> None:
    """Three steps. One layer's bias and another one's weight are frozen."""
    calls = calls_of(LAYERS, 3, wanted=SOME)
    training = Training(calls[0], rule, groups)
    with by_the_library(3):
        found = train(cpu, training, calls)
    check_update(training, calls, found)


def test_an_empty_batch_still_decays() -> None:
    calls = calls_of(LAYERS, 1, rows=0)
    training = Training(calls[0], "momentum", MOMENTUM)
    check_update(training, calls, train(cpu, training, calls))


class Watching(TorchDispatchMode):
    """Counts products."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


class Other(Tensor):
    """A tensor that may be anything."""


CHANGES: dict[str, Any] = {
    "float64": lambda call: make_call(plain_network(LAYERS), torch.float64),
    "bfloat16": lambda call: make_call(plain_network(LAYERS), torch.bfloat16),
    "a subclass": lambda call: replace(call, saved=[call.saved[0].as_subclass(Other), *call.saved[1:]]),
    "negated lazily": lambda call: replace(call, inputs=[torch._neg_view(call.inputs[0]), *call.inputs[1:]]),
    "many layers": lambda call: make_call(plain_network([plain_layer(width_in=3, width_out=4)] * (MOST_LAYERS + 1))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_left_to_the_torch_backend(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = CHANGES[change](make_call(plain_network(LAYERS)))
    dtype = call.error.dtype
    training, results = Training(call, "momentum", MOMENTUM[:1], dtype), []
    monkeypatch.setattr(operators, "_run", None)
    for backend in (cpu, torch_backend):
        weights, state = training.memory()
        backend.layer_update_(call.arguments(), weights, state, operator_rule("momentum"), training.hyper(1))
        results.append(weights + state + backend.layer_grads(call.arguments(), dtype))
    assert_same(*results)


@pytest.mark.parametrize("rule", STATE)
def test_numbers_in_memory_are_left_to_the_torch_backend(rule: str) -> None:
    calls = calls_of(LAYERS, 2)
    training = Training(calls[0], rule, RULES[rule][1])
    found, same = (train(backend, training, calls, in_memory=True) for backend in (cpu, torch_backend))
    assert_same(found[0] + found[1], same[0] + same[1])


def test_what_watches_operators_sees_products() -> None:
    call = make_call(plain_network(LAYERS)).arguments()
    cpu.layer_grads(call, torch.float32)
    with Watching() as watching:
        cpu.layer_grads(call, torch.float32)
    assert watching.products == len(call.inputs) + 1


def test_gradients_of_many_errors_at_once() -> None:
    """By torch's own batching, whose tensors have no memory of their own."""
    model = dfa.DFA(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), backend="cpu")
    output, errors = model(torch.randn(4, 6)), torch.randn(5, 4, 3)
    parameters = [*model.net.parameters()]
    found = torch.autograd.grad(output, parameters, errors, is_grads_batched=True, retain_graph=True)
    for i, error in enumerate(errors):
        for batched, alone in zip(
            found, torch.autograd.grad(output, parameters, error, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(batched[i], alone)


def test_an_error_without_memory() -> None:
    call = make_call(plain_network(LAYERS))
    zero = torch._efficientzerotensor(call.error.shape)
    for gradient in cpu.layer_grads(call.arguments()._replace(error=zero), torch.float32):
        assert not gradient.any()


def test_large_products_are_left_to_the_torch_backend() -> None:
    said = []
    with installed(fresh_library()):
        for rows in (64, 2048):
            call = make_call(plain_network([plain_layer(width_in=64, width_out=64)], rows=rows)).arguments()
            said.append(cpu.describe_layers(call, torch.float32, "store", CPU))
    by_torch = torch_backend.describe_layers(call, torch.float32, "store", CPU)
    assert said[0] == "all 2 layers in one call of C++"
    assert said[1].startswith(f"{by_torch}, by the torch backend: ") and " products, more than " in said[1]


def test_a_call_that_the_library_refuses() -> None:
    """It says why, and nothing is written."""
    refuse = fresh_library().bound(Arguments(layers=1), (ctypes.c_int * 1)(10**6))
    with pytest.raises(RuntimeError, match="dfa_kernels' CPU library: places: got 1000000"):
        refuse(bytes(8))
    refuse = fresh_library().bound(Arguments(layers=1, dtype=1), (ctypes.c_int * 0)())
    with pytest.raises(RuntimeError, match="dfa_kernels' CPU library: dtype: got 1"):
        refuse(b"")


def test_without_a_library_torch_is_used(tmp_path: Any) -> None:
    assert backends.automatic_choice(CPU) == ("cpu", "C++ for all layers of small networks, for others torch")
    with pytest.raises(
        LibraryError, match=r"no library was built: .*none.so is not there; install where a C\+\+"
    ) as no:
        load(tmp_path / "none.so")
    with installed(no.value):
        assert backends.resolve("auto", CPU) == "torch"
        with pytest.raises(ValueError, match=r"backend: 'cpu' is not available: no library was built.*'auto' or"):
            backends.resolve("cpu", CPU)


def test_tensors_elsewhere() -> None:
    with pytest.raises(ValueError, match="backend: 'cpu' got tensors on meta, expected cpu; use 'auto' or 'torch'"):
        backends.resolve("cpu", torch.device("meta"))


@pytest.mark.parametrize("optimizer", ["dfa.SGD", "dfa.AdamW", "torch.SGD"])
def test_a_model_learns_the_same_by_this_backend(optimizer: str) -> None:
    """Through the wrapper, its autograd node and a fused optimizer; local graphs get their δ from torch."""
    ends = []
    for backend in ("cpu", "torch"):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(),
            nn.Linear(24, 5),
        )  # fmt: skip
        x, y = torch.randn(9, 12), torch.randint(5, (9,))
        model = dfa.DFA(net, dfa.Feedback(storage="procedural"), backend=backend)
        made = getattr(dfa.optim if optimizer.startswith("dfa") else torch.optim, optimizer.partition(".")[2])
        opt = made(model if optimizer.startswith("dfa") else model.parameters(), lr=0.01)
        for _ in range(3):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        assert f"backend {backend} on cpu" in str(model.plan())
        ends.append([p.detach() for p in net.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
