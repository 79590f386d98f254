"""The CUDA C++ kernels on a GPU: every task in every precision, updates, taps, graphs, streams, and the same bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close_to_oracle
from test_gpu import PRECISIONS, check_grads, numbers_of, poison, shifted, updated
from test_triton_taps import ORDERS, TapCase, plain_call
from torch import Tensor, nn
from triton_cases import CASES, DEVICE, FEEDBACKS, Call, make_call, plain_layer, plain_network

import dfa_kernels as dfa
from bench.gpu.graphs import captured
from dfa_kernels.backends import cuda
from dfa_kernels.backends.csrc import projected
from dfa_kernels.backends.cuda import operators, plan


def capability() -> int:
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    return 10 * major + minor


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(cuda.why_not(capability() or None)), reason=cuda.why_not(capability() or None) or "-"),
]

NAMES = ["ieee", "float16", *(["bfloat16"] if capability() >= projected.OLDEST_FOR_BFLOAT16 else [])]
each_task = pytest.mark.parametrize("task", ["strip", "wide"])
each_precision = pytest.mark.parametrize("precision", NAMES)


@contextmanager
def running(task: str) -> Iterator[None]:
    """Layers' calls go by this task, from poisoned memory."""
    target = operators.target_of(DEVICE)._replace(shared=0 if task == "wide" else 2**20)
    largest = plan.LARGEST_STRIP_ERROR if task == "wide" else 2**30
    operators.forget_plans()
    with (
        mock.patch.object(operators, "target_of", lambda device: target),
        mock.patch.object(plan, "LARGEST_STRIP_ERROR", largest),
    ):
        poison()
        yield
    operators.forget_plans()


def grads(call: Call, task: str) -> list[Tensor]:
    with running(task):
        assert operators.plan_for(call.arguments(), "store", torch.float32).task == task
        return cuda.layer_grads(call.arguments(), torch.float32)


def make_network(width: int = 80, **changes: Any) -> dict[str, Any]:
    layers = [plain_layer(width_in=160, width_out=144), plain_layer(("relu", 0.0, 0.0), width_in=144, width_out=width)]
    return plain_network(layers, **{"output_width": width, "rows": 70, "error_size": 33, **changes})


@each_task
@each_precision
@pytest.mark.parametrize("place", FEEDBACKS, ids="-".join)
def test_every_feedback(task: str, precision: str, place: tuple[str, str]) -> None:
    feedback = {"place": place, "seed": 2**40 + 3, "normalize": True, "gain": 1.0, "nonzeros": None}
    call = make_call(make_network(feedback=feedback), PRECISIONS[precision])
    check_grads(call, grads(call, task), precision)


@each_task
@each_precision
def test_every_activation(task: str, precision: str) -> None:
    layers = [plain_layer(case, width_in=48, width_out=64) for case in CASES]
    call = make_call(plain_network(layers, output_width=64, rows=70, error_size=33), PRECISIONS[precision])
    check_grads(call, grads(call, task), precision)


@each_task
@each_precision
@pytest.mark.parametrize("widths", [(128, 256, 64), (131, 257, 67)], ids=["aligned", "odd"])
def test_dropout_positions_and_any_layout(task: str, precision: str, widths: tuple[int, int, int]) -> None:
    layers = [
        plain_layer(width_in=widths[0], width_out=widths[1], mask=True, layout="gaps"),
        plain_layer(width_in=widths[1], width_out=widths[0], positions=2, layout="transposed"),
        plain_layer(width_in=widths[0], width_out=widths[0], layout="offset"),
    ]
    network = plain_network(layers, output_width=widths[2], rows=47, error_size=33, error_layout="transposed")
    call = make_call(network, PRECISIONS[precision])
    check_grads(call, grads(call, task), precision)


@each_task
@each_precision
@pytest.mark.parametrize("rows", [0, 1, 129])
def test_unusual_batches(task: str, precision: str, rows: int) -> None:
    call = make_call(make_network(rows=rows), PRECISIONS[precision])
    check_grads(call, grads(call, task), precision)


@each_task
@each_precision
@pytest.mark.parametrize("shift", [1, 3])
def test_misaligned_tensors(task: str, precision: str, shift: int) -> None:
    call = make_call(make_network(), PRECISIONS[precision])
    first = grads(call, task)
    call.inputs = [shifted(x, shift) for x in call.inputs]
    call.saved = [shifted(h, shift) for h in call.saved]
    call.error = shifted(call.error, shift)
    for a, b in zip(grads(call, task), first, strict=True):
        assert torch.equal(a, b)


@each_task
@each_precision
def test_a_hundred_repeats_are_bitwise_equal(task: str, precision: str) -> None:
    layers = [plain_layer(width_in=304, width_out=528), plain_layer(width_in=528, width_out=528)]
    rows = 120 if task == "strip" else 300
    call = make_call(plain_network(layers, output_width=528, rows=rows, error_size=33), PRECISIONS[precision])
    first = grads(call, task)
    for turn in range(99):
        for a, b in zip(first, grads(call, task), strict=True):
            assert torch.equal(a, b), f"turn {turn}"


@each_task
@each_precision
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adamw"])
def test_updates_are_those_of_their_own_gradients(task: str, precision: str, rule: str) -> None:
    call = make_call(make_network(), PRECISIONS[precision])
    name, hyper, states = numbers_of(rule)
    made = grads(call, task)
    weights = [torch.randn_like(g) for g in made]
    state = [torch.rand_like(g) for g in made for _ in range(states)]
    exact, plain = (updated(name, hyper, weights, state, made, dtype) for dtype in (torch.float64, torch.float32))
    found, first_state = [*(w.clone() for w in weights), *(s.clone() for s in state)], len(weights)
    with running(task):
        cuda.layer_update_(call.arguments(), found[:first_state], found[first_state:], name, hyper * len(weights))
    for i, (out, ref64, same) in enumerate(zip(found, exact, plain, strict=True)):
        assert_close_to_oracle(out, ref64, same, 1.0, f"{rule} {i}")


@pytest.mark.parametrize("order", ORDERS)
def test_taps(order: str) -> None:
    cases = [TapCase((35,)), TapCase((6, 3, 5), ("gelu", 0.0, 0.0), order, "contiguous"), TapCase((200,), CASES[1])]
    call = plain_call(cases, ("rademacher", "procedural"), rows=70, error_size=130)
    poison()
    call.check(cuda.project_taps(call.arguments()))


def learning(steps: int, graphed: bool) -> list[Tensor]:
    """The parameters of a model after some steps by this backend."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 72), nn.ReLU(), nn.Linear(72, 10)).to(DEVICE).half()
    x, y = torch.randn(64, 60, device=DEVICE).half(), torch.randint(10, (64,), device=DEVICE)
    model = dfa.DFA(net, backend="cuda")
    optimizer, first = dfa.optim.SGD(model, lr=0.05, momentum=0.9), copy.deepcopy(net.state_dict())

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()

    def restore() -> None:
        net.load_state_dict(first)
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()

    run = captured(step, restore=restore) if graphed else step
    restore()
    for _ in range(steps):
        run()
    return [p.detach().clone() for p in net.parameters()]


def test_a_graph_of_a_whole_step_ends_where_the_eager_run_ends() -> None:
    for a, b in zip(learning(5, graphed=True), learning(5, graphed=False), strict=True):
        assert torch.equal(a, b)


def test_a_graph_follows_a_learning_rate() -> None:
    """The kernels read it where the optimizer brings it, at every replay."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 80), nn.Tanh(), nn.Linear(80, 10)).to(DEVICE)
    x, y = torch.randn(64, 60, device=DEVICE), torch.randint(10, (64,), device=DEVICE)
    model = dfa.DFA(net, backend="cuda")
    optimizer = dfa.optim.SGD(model, lr=0.5, capturable=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    replay = captured(step)
    moved = []
    for rate in (0.5, 0.0, 0.25):
        optimizer.param_groups[0]["lr"] = rate
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.refresh()
        replay()
        moved.append([not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)])
    assert moved == [[True] * 4, [False] * 4, [True] * 4]


def test_on_another_stream() -> None:
    """The launch waits for what the stream has to do before it."""
    call = make_call(make_network(), torch.float16)
    expected, stream = grads(call, "strip"), torch.cuda.Stream()
    late = call.error.clone()
    call.error.fill_(torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        call.error.copy_(late)
        found = grads(call, "strip")
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
