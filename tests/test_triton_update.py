"""`layer_update_` as Triton kernels, against torch.optim in float64 on the gradients of the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, note, settings
from oracle import assert_close_to_oracle
from torch import Tensor
from triton_cases import (
    DEVICE,
    FRESH,
    Call,
    forced,
    guarded,
    in_nans,
    launched,
    make_call,
    margins_are_nan,
    plain_layer,
    plain_network,
    randoms,
    some_network,
    watched,
)

from dfa_kernels import updates
from dfa_kernels.backends import torch_backend
from dfa_kernels.backends import triton as triton_backend
from dfa_kernels.backends.calls import DeviceNumbers
from dfa_kernels.backends.triton import launch, operators
from dfa_kernels.backends.triton.kernels.epilogue import complement

both_kernels = pytest.mark.parametrize("kernel", ["strip", "two_phase", "grouped_gemm", "products"])

# Each rule with the options of torch's optimizer for one group of parameters after the other.
SGD = [{"lr": 0.1}, {"lr": 0.02, "weight_decay": 0.3}]
MOMENTUM = [
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.3},
    {"lr": 0.07, "momentum": 0.8, "weight_decay": 0.2, "nesterov": True},
    {"lr": 0.03, "weight_decay": 0.1},
    {"lr": 0.04, "momentum": 0.6, "nesterov": True},
]
ADAMW = [
    {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.0},
    {"lr": 0.02, "betas": (0.7, 0.95), "eps": 1e-2, "weight_decay": 0.3},
    {"lr": 0.03, "betas": (0.0, 0.5), "eps": 0.1, "weight_decay": 0.1},
]
RULES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "sgd": ("sgd", SGD[:1]),
    "weight decay": ("sgd", SGD[1:]),
    "momentum": ("momentum", MOMENTUM[:1]),
    "momentum and weight decay": ("momentum", MOMENTUM[1:2]),
    "nesterov": ("momentum", MOMENTUM[4:]),
    "nesterov and weight decay": ("momentum", MOMENTUM[2:3]),
    "adamw": ("adamw", ADAMW[:1]),
    "adamw and weight decay": ("adamw", ADAMW[1:2]),
    "groups of sgd": ("sgd", SGD),
    "groups of momentum": ("momentum", MOMENTUM),
    "groups of adamw": ("adamw", ADAMW),
}
every_rule = pytest.mark.parametrize(("rule", "groups"), RULES.values(), ids=RULES)
STATE = {"sgd": (), "momentum": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
STEPS_BEFORE = 4


class Training:
    """Parameters with a history, of one call's layers; groups of options go round them."""

    def __init__(self, call: Call, rule: str, groups: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> None:
        self.rule, self.dtype = rule, dtype
        shapes = [gradient.shape for _, gradient, _ in call.wanted_gradients()]
        self.options = [groups[i % len(groups)] for i in range(len(shapes))]
        generator = torch.Generator().manual_seed(3)
        self.weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        # Second moments of the size that they have after some steps, so that their root is no amplifier of rounding.
        self.state = [
            [torch.rand(shape, generator=generator).add(0.1).to(dtype) for _ in STATE[rule]] for shape in shapes
        ]
        self.scales = [0.0] * len(shapes)

    def memory(self) -> tuple[list[Tensor], list[Tensor]]:
        """Copies of the parameters and of their state, with NaN around them."""
        return [in_nans(w) for w in self.weights], [in_nans(s) for state in self.state for s in state]

    def hyper(self, step: int) -> list[float]:
        """The operator's numbers for the update number `step`."""
        numbers: list[float] = []
        for o in self.options:
            if self.rule == "adamw":
                numbers += [o["lr"], *o["betas"], o["eps"], o["weight_decay"], float(STEPS_BEFORE + step)]
            else:
                numbers += [o["lr"], o.get("momentum", 0), o.get("weight_decay", 0), float(o.get("nesterov", False))]
        return numbers

    def on_device(self, step: int) -> DeviceNumbers:
        """The same in memory, among the rows of parameters that have no part in the call."""
        row, hyper = updates.RULES[self.rule].row, self.hyper(step)
        table = []
        for numbers in updates.shares(hyper, len(self.weights)):
            own = (*row(*numbers[:5]), numbers[5]) if self.rule == "adamw" else row(*numbers)
            table += [[torch.nan] * len(own), own]
        return DeviceNumbers(torch.tensor(table, device=DEVICE), range(1, len(table), 2))

    def reference(self, calls: Sequence[Call]) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters and state after torch's optimizer, in float64."""
        kind = torch.optim.AdamW if self.rule == "adamw" else torch.optim.SGD
        parameters = [torch.nn.Parameter(w.double()) for w in self.weights]
        optimizer: Any = kind([{"params": [p], **o} for p, o in zip(parameters, self.options, strict=True)])
        for p, state in zip(parameters, self.state, strict=True):
            names = zip(STATE[self.rule], state, strict=True)
            optimizer.state[p] = {name: s.double() for name, s in names}
            if self.rule == "adamw":
                optimizer.state[p]["step"] = torch.tensor(float(STEPS_BEFORE))
        for call in calls:
            for i, (_, gradient, scale) in enumerate(call.wanted_gradients()):
                parameters[i].grad = gradient
                self.scales[i] += scale
            optimizer.step()
        return (
            [p.detach() for p in parameters],
            [optimizer.state[p][name] for p in parameters for name in STATE[self.rule]],
        )


def operator_rule(rule: str) -> str:
    return "adamw" if rule == "adamw" else "sgd"


def train(
    backend: Any, training: Training, calls: Sequence[Call], in_memory: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    weights, state = training.memory()
    for step, call in enumerate(calls, 1):
        versions = [w._version for w in weights]
        hyper = training.on_device(step) if in_memory else training.hyper(step)
        backend.layer_update_(call.arguments(), weights, state, operator_rule(training.rule), hyper)
        assert all(w._version > version for w, version in zip(weights, versions, strict=True))
    assert all(margins_are_nan(t) for t in (*weights, *state))
    return weights, state


def run(
    training: Training, calls: Sequence[Call], kernel: str, start: int = 1, in_memory: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and state after the updates, each made by this kernel alone."""
    with forced(kernel, start), watched() as seen:
        found = train(triton_backend, training, calls, in_memory)
    assert launched(seen, kernel, len(calls))
    return found


def check(training: Training, calls: Sequence[Call], found: tuple[list[Tensor], list[Tensor]]) -> None:
    reference, same = training.reference(calls), train(torch_backend, training, calls)
    for what, out, ref, torchs in zip(("weight", "state"), found, reference, same, strict=True):
        each = len(out) // len(training.weights)
        for i, (a, r, s) in enumerate(zip(out, ref, torchs, strict=True)):
            scale = training.scales[i // each]
            # The second moment holds squares.
            scale = max(scale, scale**2) if what == "state" else scale
            assert_close_to_oracle(a.cpu(), r, s.cpu(), scale, f"{what} {i}")


def calls_of(layers: list[dict[str, Any]], n: int, **changes: Any) -> list[Call]:
    """Steps of one network on different batches."""
    return [make_call(plain_network(layers, seed=seed, **changes)) for seed in range(n)]


LAYERS = [plain_layer(width_in=35, width_out=17), plain_layer(("relu", 0.0, 0.0), mask=True), plain_layer(positions=2)]
SOME = ([True, True, False, True], [True, False, True, True])


@both_kernels
@every_rule
def test_every_rule(kernel: str, rule: str, groups: list[dict[str, Any]]) -> None:
    """Three steps. One layer's bias and another one's weight are frozen."""
    calls = calls_of(LAYERS, 3, wanted=SOME)
    training = Training(calls[0], rule, groups)
    check(training, calls, run(training, calls, kernel))


@both_kernels
@pytest.mark.parametrize("rule", STATE)
def test_numbers_in_memory(kernel: str, rule: str) -> None:
    """They give what the same numbers as arguments do.

    Up to rounding of AdamW, whose corrections are made there, and of products that added to the weights themselves.
    """
    calls = calls_of(LAYERS, 3, wanted=SOME)
    training = Training(calls[0], rule, RULES[f"groups of {rule}"][1])
    found = run(training, calls, kernel, in_memory=True)
    if rule == "adamw" or kernel == "products":
        check(training, calls, found)
        return
    given = run(training, calls, kernel)
    for a, b in zip(found[0] + found[1], given[0] + given[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU's kernels are really compiled")
def test_a_compiled_kernel_takes_the_address_of_numbers_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it takes those of tensors; numbers themselves as they are."""
    started: list[tuple[Any, ...]] = []
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(operators, "launch", lambda *arguments: started.append(arguments))
    (call,) = calls_of(LAYERS, 1)
    training = Training(call, "sgd", SGD)
    weights, _ = training.memory()
    numbers = training.on_device(1)
    for hyper in (numbers, training.hyper(1)):
        triton_backend.layer_update_(call.arguments(), [w.clone() for w in weights], [], "sgd", hyper)
        plan, _, tensors, launched = started[-1]
        monkeypatch.setitem(plan.compiled, 0, lambda *arguments: given.append(arguments))
        launch._launch(
            plan, 0, [tuple(t.clone() for t in g) if type(g) is tuple else g.clone() for g in tensors], launched
        )
    assert len(plan.kernel.arg_names) == len(given[0]) == len(given[1])
    at = plan.kernel.arg_names.index("hyper")
    assert given[0][at] == (numbers.table.data_ptr(),)
    assert given[1][at] == (0.1, 0.0, 0.02, 0.3)


@pytest.mark.parametrize("rule", STATE)
def test_the_torch_backend_takes_numbers_in_memory(rule: str) -> None:
    calls = calls_of(LAYERS, 3, wanted=SOME)
    training = Training(calls[0], rule, RULES[f"groups of {rule}"][1])
    check(training, calls, train(torch_backend, training, calls, in_memory=True))


@triton.jit
def _complements(x, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, complement(tl.load(x + at)))


def test_one_minus_beta_to_the_power_of_any_step() -> None:
    """In float32 that power alone would leave 1e-4 of a beta of 0.9999 wrong."""
    steps = torch.tensor([1.0, 2.0, 3.0, 10.0, 100.0, 1e3, 1e4, 1e6], dtype=torch.float64)
    for beta in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999):
        log = updates.RULES["adamw"].row(1.0, beta, beta, 1.0, 0.0)[6]
        x, out = (steps.float() * torch.tensor(log)).to(DEVICE), torch.empty(8, device=DEVICE)
        _complements[(1,)](x, out, 8)
        torch.testing.assert_close(out.cpu().double(), 1 - beta**steps, rtol=4e-7, atol=0)


@both_kernels
@settings(**FRESH, max_examples=10)
@given(random=randoms)
def test_any_network(kernel: str, random: Random) -> None:
    network = some_network(random, kernel, most_hidden=3)
    rule, groups = random.choice(list(RULES.values()))
    note(f"{rule} {groups} {network}")
    calls = [make_call(network)]
    training = Training(calls[0], rule, groups)
    check(training, calls, run(training, calls, kernel, network["config"]))


@both_kernels
@pytest.mark.parametrize("rule", STATE)
def test_the_same_bits_again(kernel: str, rule: str) -> None:
    calls = calls_of(LAYERS, 1)
    training = Training(calls[0], rule, RULES[f"groups of {rule}"][1])
    first, second = run(training, calls, kernel), run(training, calls, kernel)
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


@both_kernels
@pytest.mark.parametrize("rule", STATE)
def test_an_empty_batch_still_decays(kernel: str, rule: str) -> None:
    """Its gradient is zero, as under torch.optim."""
    calls = calls_of(LAYERS, 1, rows=0)
    training = Training(calls[0], rule, RULES[f"groups of {rule}"][1])
    check(training, calls, run(training, calls, kernel))


@both_kernels
@pytest.mark.parametrize("rule", STATE)
def test_parameters_in_half_precision(kernel: str, rule: str) -> None:
    calls = calls_of(LAYERS, 1)
    training = Training(calls[0], rule, RULES[f"groups of {rule}"][1], torch.float16)
    check(training, calls, run(training, calls, kernel))


@pytest.mark.parametrize("rule", STATE)
def test_products_of_the_library_add_to_large_parameters(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of small ones, as in the other tests, are stored first."""
    monkeypatch.setattr(updates, "SMALL", 0)
    calls = calls_of(LAYERS, 3, wanted=SOME)
    training = Training(calls[0], rule, RULES[f"groups of {rule}"][1])
    check(training, calls, run(training, calls, "products"))


@both_kernels
@pytest.mark.parametrize("small", [True, False])
def test_updates_are_by_the_gradients_that_would_be_stored(
    kernel: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of biases too, in float16: by sums of δ before it is rounded."""
    monkeypatch.setattr(updates, "SMALL", updates.SMALL if small else 0)
    call = make_call(plain_network(LAYERS, rows=70), torch.float16)
    with forced(kernel, 1):
        gradients = triton_backend.layer_grads(call.arguments(), torch.float32)
        weights = [torch.zeros_like(gradient) for gradient in gradients]
        triton_backend.layer_update_(call.arguments(), weights, [], "sgd", [1.0, 0.0, 0.0, 0.0] * len(weights))
    for weight, gradient in zip(weights, gradients, strict=True):
        assert torch.equal(weight, -gradient)


@both_kernels
def test_a_group_without_momentum_keeps_its_buffer(kernel: str) -> None:
    calls = calls_of(LAYERS, 1)
    training = Training(calls[0], "momentum", [MOMENTUM[3]])
    _, state = run(training, calls, kernel)
    for out, before in zip(state, training.state, strict=True):
        assert torch.equal(out.cpu(), before[0])


@both_kernels
def test_tensors_that_nothing_updates_are_left_alone(kernel: str) -> None:
    """Inputs and activations keep their values and version counters."""
    (call,) = calls_of(LAYERS, 1, wanted=SOME)
    read = [t for t in (call.error, *call.inputs, *call.saved, *call.masks) if t is not None]
    before, versions = [t.clone() for t in read], [t._version for t in read]
    run(Training(call, "momentum", MOMENTUM), [call], kernel)
    for t, b, version in zip(read, before, versions, strict=True):
        assert torch.equal(t, b)
        assert t._version == version


def test_numbers_in_float64_are_left_to_the_torch_backend() -> None:
    """Those of an optimizer that has parameters in float64, too."""
    (call,) = calls_of(LAYERS, 1)
    training, results = Training(call, "adamw", ADAMW), []
    table, rows = training.on_device(1)
    for backend in (triton_backend, torch_backend):
        weights, state = training.memory()
        with watched() as seen:
            backend.layer_update_(call.arguments(), weights, state, "adamw", DeviceNumbers(table.double(), rows))
        assert seen.kernels == []
        results.append(weights + state)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_parameters() -> None:
    (call,) = calls_of(LAYERS[:1], 1, wanted=([False] * 2, [False] * 2))
    with watched() as seen:
        triton_backend.layer_update_(call.arguments(), [], [], "sgd", [])
    assert seen.kernels == []


def scattered(tensor: Tensor) -> Tensor:
    """The same values, its columns one after the other in memory."""
    plain = tensor.to(DEVICE)
    strides = tuple(reversed(plain.t().contiguous().stride()))
    return guarded(tuple(plain.shape), strides, plain.dtype)[1].copy_(plain)


def mixed(weights: list[Tensor]) -> list[Tensor]:
    return [weights[0].half(), *weights[1:]]


FALLBACKS = {
    "scattered weights": (torch.float32, lambda ws: [scattered(ws[0]), *ws[1:]], lambda state: state),
    "scattered state": (torch.float32, lambda ws: ws, lambda state: [scattered(state[0]), *state[1:]]),
    "mixed dtypes": (torch.float32, mixed, mixed),
    "float64": (torch.float64, lambda ws: [w.double() for w in ws], lambda state: [s.double() for s in state]),
}


@pytest.mark.parametrize(("dtype", "change", "change_state"), FALLBACKS.values(), ids=FALLBACKS)
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_what_is_left_to_the_torch_backend(rule: str, dtype: torch.dtype, change: Any, change_state: Any) -> None:
    call = make_call(plain_network(LAYERS), dtype)
    training = Training(call, rule, ADAMW if rule == "adamw" else MOMENTUM[:3])
    results = []
    for backend in (triton_backend, torch_backend):
        weights, state = training.memory()
        changed = [change(weights), change_state(state)]
        arguments = (call.arguments(), *changed, operator_rule(rule), training.hyper(1))
        with watched() as seen:
            backend.layer_update_(*arguments)
        assert seen.kernels == []
        results.append(changed[0] + changed[1])
    before = training.memory()
    for a, b, was in zip(*results, before[0] + before[1], strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a.double(), was.double())
