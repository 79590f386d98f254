"""`layer_grads` and `layer_update_` as CUDA C++ against the formulas: csrc's kernels, run thread by thread on a CPU.

Fresh memory is poisoned, shared memory as well. Threads run one after the other between barriers, in both orders.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from cuda_host import needs_a_compiler, on_host
from hypothesis import given, note, settings
from oracle import assert_close_to_oracle
from test_triton_update import LAYERS, MOMENTUM, RULES, SOME, STATE, Training, calls_of, operator_rule, train
from test_triton_update import check as check_update
from torch import Tensor, nn
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
from dfa_kernels.backends import cuda, torch_backend
from dfa_kernels.backends.calls import LayerCall
from dfa_kernels.backends.csrc.arguments import MOST_LAYERS

pytestmark = [
    needs_a_compiler,
    pytest.mark.skipif(DEVICE.type == "cuda", reason="tensors are on the GPU, where test_gpu_cuda.py runs the kernels"),
]
TASKS = ["strip", "wide"]
both_tasks = pytest.mark.parametrize("task", TASKS)


def run(call: Call | LayerCall, task: str, dtype: torch.dtype = torch.float32, **how: Any) -> list[Tensor]:
    """The gradients, by one call of this task."""
    with on_host(task, **how) as ran, Poison() as poison:
        found = cuda.layer_grads(call.arguments() if isinstance(call, Call) else call, dtype)
    assert ran == [task]
    assert all(margins_are_nan(view) for view in poison.made)
    return found


def check(call: Call, found: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """As near to the formulas in float64 as the torch backend."""
    same = torch_backend.layer_grads(call.arguments(), dtype)
    for (name, ref, scale), out, torchs in zip(call.wanted_gradients(), found, same, strict=True):
        assert out.dtype == dtype
        assert_close_to_oracle(out, ref, torchs, scale, name)


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@both_tasks
@settings(**FRESH, max_examples=60)
@given(random=randoms)
def test_any_network(task: str, random: Random) -> None:
    network = some_network(random, "two_phase")
    note(str(network))
    call = make_call(network)
    check(call, run(call, task))


def test_gradients_of_one_width_come_from_one_block() -> None:
    call = make_call(plain_network([plain_layer(width_in=8, width_out=8)] * 3, output_width=8))
    with on_host():
        found = cuda.layer_grads(call.arguments(), torch.float32)
    check(call, found)
    assert len({gradient.untyped_storage().data_ptr() for gradient in found}) == 2 < len(found)


@both_tasks
def test_every_activation(task: str) -> None:
    layers = [plain_layer(case, mask=i % 3 == 0) for i, case in enumerate(CASES)]
    call = make_call(plain_network(layers))
    check(call, run(call, task))


@both_tasks
@pytest.mark.parametrize("place", FEEDBACKS, ids="-".join)
def test_every_feedback(task: str, place: tuple[str, str]) -> None:
    """Errors so wide that they take several tiles, and signs several Philox calls."""
    layers = [plain_layer(width_out=35), plain_layer(positions=2), plain_layer(width_out=17)]
    network = plain_network(layers, error_size=130)
    network["feedback"].update(place=place, gain=-0.5, seed=2**40 + 3)
    call = make_call(network)
    check(call, run(call, task))
    network["feedback"].update(normalize=False)
    call = make_call(network)
    check(call, run(call, task))


@both_tasks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "uniform", "sparse"])
def test_feedback_in_another_precision(task: str, dtype: torch.dtype, kind: str) -> None:
    """Entries are rounded to it, in memory and when made anew."""
    call = make_call(plain_network([plain_layer(), plain_layer(width_out=17)]))
    for storage in ("dense", "procedural"):
        call.feedback = dfa.Feedback(kind, storage, seed=2**40 + 3, dtype=dtype)
        check(call, run(call, task))


@both_tasks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("error_dtype", ["the same", "float32"])
@pytest.mark.parametrize("width", [80, 131])
def test_half_precision(task: str, dtype: torch.dtype, error_dtype: str, width: int) -> None:
    """By fragments, as tensor cores take them; with rows of whole 16 bytes and without."""
    layers = [plain_layer(width_in=160, width_out=144), plain_layer(("gelu", 0.0, 0.0), 144, width, mask=True)]
    call = make_call(plain_network(layers, output_width=width, rows=70, error_size=16), dtype)
    if error_dtype == "float32":
        call.error = call.error.float()
    check(call, run(call, task))
    check(call, run(call, task, dtype), dtype)


@both_tasks
def test_biases_are_sums_of_delta_before_it_is_rounded(task: str) -> None:
    """float16 with a U of signs, so that nothing else is rounded: as if all had been float32."""
    network = plain_network([plain_layer(width_out=33), plain_layer(positions=3)], rows=70, error_size=9)
    network["feedback"].update(place=("rademacher", "dense"))
    call = make_call(network, torch.float16)
    wide = replace(
        call,
        error=call.error.double(),
        inputs=[x.double() for x in call.inputs],
        saved=[h.double() for h in call.saved],
    )
    exact = torch_backend.layer_grads(wide.arguments(), torch.float64)
    for (name, _, scale), out, ref in zip(call.wanted_gradients(), run(call, task), exact, strict=True):
        if name.startswith("b"):
            assert_close_to_oracle(out, ref, ref, scale, name)


@both_tasks
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 129])
def test_batches_of_any_size(task: str, rows: int) -> None:
    call = make_call(plain_network([plain_layer(mask=True), plain_layer(width_in=64, width_out=64)], rows=rows))
    check(call, run(call, task))


@both_tasks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_same_bits_in_either_order_of_threads(task: str, dtype: torch.dtype) -> None:
    """Where a barrier is missing, what a thread reads depends on who ran before it. And by any number of programs."""
    layers = [plain_layer(width_in=200, width_out=130), plain_layer(width_in=67, positions=2, mask=True)]
    for place in (("gaussian", "procedural"), ("sparse", "dense"), ("matrix", "dense")):
        network = plain_network(layers, rows=45, error_size=33)
        network["feedback"].update(place=place)
        call = make_call(network, dtype)
        first = run(call, task)
        assert_same(run(call, task, backwards=True), first)
        for multiprocessors in (1, 50):
            assert_same(run(call, task, multiprocessors=multiprocessors), first)


@both_tasks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_same_bits_wherever_tensors_begin(task: str, dtype: torch.dtype) -> None:
    """16 bytes at once where they are aligned, number by number where not."""
    layers = [plain_layer(width_in=64, width_out=96, mask=True), plain_layer(width_in=96, width_out=64)]
    call = make_call(plain_network(layers, output_width=64, rows=40, error_size=16), dtype)
    first = run(call, task)
    shifted: Any = replace(
        call,
        inputs=[behind(x, 1) for x in call.inputs],
        saved=[behind(h, 3) for h in call.saved],
        masks=[None if mask is None else behind(mask, 1) for mask in call.masks],
        error=behind(call.error, 1),
    )
    assert_same(run(shifted, task), first)


def behind(tensor: Tensor, elements: int) -> Tensor:
    """A contiguous copy that begins so many elements behind an aligned address."""
    memory = torch.full((tensor.numel() + elements,), torch.nan, dtype=tensor.dtype)
    return memory[elements:].view(tensor.shape).copy_(tensor)


@both_tasks
def test_some_gradients_wanted(task: str) -> None:
    """Of some layers neither; the bias is summed once, however many programs there are."""
    wide = [plain_layer(width_in=200, width_out=140) for _ in range(4)]
    wanted = ([True, False, False, False, True], [True, False, True, False, False])
    call = make_call(plain_network(wide, wanted=wanted))
    check(call, run(call, task))


def test_no_gradient_wanted() -> None:
    call = make_call(plain_network([plain_layer()], wanted=([False] * 2, [False] * 2)))
    with on_host() as ran:
        assert cuda.layer_grads(call.arguments(), torch.float32) == []
        assert cuda.describe_layers(call.arguments(), torch.float32, "store", DEVICE).startswith("nothing")
    assert ran == []


@both_tasks
def test_an_output_layer_alone(task: str) -> None:
    call = make_call(plain_network([], error_size=70))
    check(call, run(call, task))


def test_more_layers_than_a_call_of_the_library_takes() -> None:
    """In several calls, of which the first has no output layer; with an update as well."""
    layers = [plain_layer(width_in=3 + i % 5, width_out=4 + i % 3) for i in range(MOST_LAYERS + 3)]
    every = [True] * (len(layers) + 1)
    calls = calls_of(layers, 1, wanted=(every, every))
    with on_host("strip") as ran:
        check(calls[0], cuda.layer_grads(calls[0].arguments(), torch.float32))
        training = Training(calls[0], "momentum", MOMENTUM)
        for in_memory in (False, True):
            check_update(training, calls, train(cuda, training, calls, in_memory))
        said = cuda.describe_layers(calls[0].arguments(), torch.float32, "store", DEVICE)
    assert ran == ["strip"] * 6
    assert said.startswith(f"in 2 parts of at most {MOST_LAYERS} layers: one launch")


@both_tasks
@pytest.mark.parametrize(("rule", "groups"), RULES.values(), ids=RULES)
def test_every_rule(task: str, rule: str, groups: list[dict[str, Any]]) -> None:
    """Three steps. One layer's bias and another one's weight are frozen."""
    calls = calls_of(LAYERS, 3, wanted=SOME)
    training = Training(calls[0], rule, groups)
    with on_host(task) as ran, Poison():
        found = train(cuda, training, calls)
    assert ran == [task] * 3
    check_update(training, calls, found)


@both_tasks
@pytest.mark.parametrize("rule", STATE)
def test_numbers_in_memory(task: str, rule: str) -> None:
    """They give what the same numbers from the host do, which are written to memory first."""
    calls = calls_of(LAYERS, 3, wanted=SOME)
    training = Training(calls[0], rule, RULES[f"groups of {rule}"][1])
    with on_host(task) as ran:
        found, given = train(cuda, training, calls, in_memory=True), train(cuda, training, calls)
    assert ran == [task] * 6
    assert_same(found[0] + found[1], given[0] + given[1])


def test_numbers_in_memory_in_float64() -> None:
    (call,) = calls_of(LAYERS, 1)
    training, found = Training(call, "adamw", RULES["adamw"][1]), []
    numbers = training.on_device(1)
    for table in (numbers.table, numbers.table.double()):
        weights, state = training.memory()
        with on_host():
            cuda.layer_update_(call.arguments(), weights, state, "adamw", numbers._replace(table=table))
        found.append(weights + state)
    assert_same(*found)


@both_tasks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", STATE)
def test_parameters_in_half_precision(task: str, rule: str, dtype: torch.dtype) -> None:
    calls = calls_of([plain_layer(width_in=64, width_out=36), *LAYERS], 1, wanted=([True] * 5, [True] * 5))
    training = Training(calls[0], rule, RULES[f"groups of {rule}"][1], dtype)
    with on_host(task):
        check_update(training, calls, train(cuda, training, calls))


@both_tasks
def test_an_empty_batch_still_decays(task: str) -> None:
    calls = calls_of(LAYERS, 1, rows=0)
    training = Training(calls[0], "momentum", MOMENTUM)
    with on_host(task):
        check_update(training, calls, train(cuda, training, calls))


def test_numbers_are_written_when_they_change() -> None:
    """And read from where they were written: two optimizers in turn do not get each other's."""
    calls = calls_of(LAYERS[:1], 1)
    for rate in (0.1, 0.2, 0.2, 0.1):
        training = Training(calls[0], "sgd", [{"lr": rate}])
        with on_host("strip"):
            check_update(training, calls, train(cuda, training, calls))


@pytest.mark.parametrize("what", ["float64", "mixed activations", "mixed parameters"])
def test_what_is_left_to_the_torch_backend(what: str) -> None:
    dtype = torch.float64 if what == "float64" else torch.float32
    call = make_call(plain_network(LAYERS), dtype)
    if what == "mixed activations":
        call.inputs[0], call.saved[0] = call.inputs[0].half(), call.saved[0].half()
    training, results = Training(call, "momentum", MOMENTUM[:1]), []
    with on_host() as ran:
        for backend in (cuda, torch_backend):
            weights, state = training.memory()
            if what == "mixed parameters":
                weights[0], state[0] = weights[0].double(), state[0].double()
            backend.layer_update_(call.arguments(), weights, state, operator_rule("momentum"), training.hyper(1))
            results.append(weights + state)
        if what != "mixed parameters":
            said = cuda.describe_layers(call.arguments(), dtype, "store", DEVICE)
            assert said.startswith("by the torch backend: ")
    assert ran == []
    assert_same(*results)


def test_what_has_no_32_bit_count_is_left_to_the_torch_backend() -> None:
    """Shapes alone: nothing of the kind fits into memory."""
    x, h, error = (torch.empty(rows, 2, device="meta") for rows in (2**31, 2**31, 2**29))
    wanted = [True] * 1
    call = LayerCall(
        error, [], dfa.Feedback(storage="procedural").spec, [x], [h], [None], ["tanh"], [0.0] * 2, wanted, wanted
    )
    with on_host():
        said = cuda.describe_layers(call, torch.float32, "store", DEVICE)
    assert said == "by the torch backend: 2147483648 rows or units are more than the kernels count"


def test_the_plan_takes_strips_for_small_batches_and_few_error_components() -> None:
    said = []
    for rows, error_size in ((64, 10), (4096, 10), (64, 65)):
        call = make_call(plain_network([plain_layer()], rows=rows, error_size=error_size))
        with on_host():
            said.append(cuda.describe_layers(call.arguments(), torch.float32, "store", DEVICE))
    assert said[0].startswith("one launch of CUDA C++ by strips (tiles 64 × 64, 2 programs, float32, U from memory)")
    assert said[1].startswith("two launches") and "two programs with δ of the whole batch" in said[1]
    assert said[2].startswith("two launches") and "65 error components" in said[2]


def test_a_model_learns_the_same_by_this_backend() -> None:
    """Through the wrapper, its autograd node and a fused optimizer; local graphs get their δ from it too."""
    ends = []
    for backend in ("cuda", "torch"):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(),
            nn.Linear(24, 5),
        )  # fmt: skip
        x, y = torch.randn(9, 12), torch.randint(5, (9,))
        with on_host() as ran:
            model = dfa.DFA(net, dfa.Feedback("rademacher", "procedural"), backend=backend)
            optimizer = dfa.optim.SGD(model, lr=0.1, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            assert ran == (["taps", "strip"] * 3 if backend == "cuda" else [])
            assert f"backend {backend} on cpu" in str(model.plan())
        ends.append([p.detach() for p in net.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
