"""The way straight to a compiled kernel: what the kernel is given, and what has to go another way.

A stand-in is the compiled kernel; it keeps what it is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import dfa_kernels as dfa
from dfa_kernels.backends import torch_backend
from dfa_kernels.backends import triton as triton_backend
from dfa_kernels.backends.calls import DeviceNumbers, LayerCall
from dfa_kernels.backends.triton import operators
from dfa_kernels.backends.triton.launch import INTERPRETED
from dfa_kernels.backends.triton.launch_plan import LaunchPlan
from dfa_kernels.backends.triton.route import forget_routes

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU's kernels are really compiled")

ROWS, WIDTH, CLASSES = 16, 24, 12
Given = dict[str, Any]


@contextmanager
def standing_in() -> Iterator[tuple[list[Given], list[LaunchPlan]]]:
    """What compiled kernels are given, by name, with the plan; and the plans of launches that go another way."""
    straight: list[Given] = []
    others: list[LaunchPlan] = []
    make = LaunchPlan.__post_init__

    def made(plan: LaunchPlan) -> None:
        make(plan)

        def keep(*given: Any) -> None:
            straight.append({"plan": plan, **dict(zip(plan.kernel.arg_names, given, strict=True))})

        plan.compiled = {None: keep}  # type: ignore[dict-item]

    forget_routes()
    with (
        patch.object(LaunchPlan, "__post_init__", made),
        patch.object(operators, "launch", lambda plan, *_: others.append(plan)),
        patch.object(torch.cuda, "current_device", lambda: None),
    ):
        yield straight, others
    forget_routes()


class Training:
    """Two hidden layers and an output layer, the first without a bias, the second with dropout."""

    def __init__(self) -> None:
        shapes = [(WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,), (CLASSES, WIDTH), (CLASSES,)]
        x, saved, mask = (torch.randn(ROWS, WIDTH) for _ in range(3))
        feedback = dfa.Feedback()
        self.call = LayerCall(
            torch.randn(ROWS, CLASSES), feedback.stored(WIDTH, CLASSES, "cpu"), feedback.spec,
            [x, saved, torch.randn(ROWS, WIDTH)], [saved, torch.randn(ROWS, WIDTH)], [None, mask], ["tanh", "relu"],
            [0.0] * 4, [True] * 3, [False, True, True],
        )  # fmt: skip
        self.weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        self.state = [torch.ones(shape) for shape in shapes for _ in range(2)]
        self.hyper: list[float] | DeviceNumbers = [1e-3, 0.9, 0.999, 1e-8, 0.01, 1.0] * len(shapes)

    @torch.no_grad()
    def update(self) -> None:
        triton_backend.layer_update_(self.call, self.weights, self.state, "adamw", self.hyper)

    def change(self, **parts: Any) -> None:
        self.call = self.call._replace(**parts)


def addresses(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors])


def arguments_of(training: Training) -> Given:
    """The tensors among the arguments of the kernel; the first input stands in where a layer has none."""
    call, weights, (m, v) = training.call, training.weights, (training.state[0::2], training.state[1::2])
    mask = call.dropout_mask[1]
    assert mask is not None
    return {
        "error": call.error.data_ptr(),
        "stored": addresses([*call.stored]),
        "inputs": addresses([*call.inputs]),
        "saved": addresses([*call.saved]),
        "dropout_mask": addresses([call.inputs[0], mask]),
        "weights": addresses([weights[0], weights[1], weights[3]]),
        "biases": addresses([weights[0], weights[2], weights[4]]),
        "weight_state0": addresses([m[0], m[1], m[3]]),
        "weight_state1": addresses([v[0], v[1], v[3]]),
        "bias_state0": addresses([m[0], m[2], m[4]]),
        "bias_state1": addresses([v[0], v[2], v[4]]),
    }


def one_further(tensor: Tensor) -> Tensor:
    """A copy that begins one number behind a multiple of 16 bytes."""
    memory = torch.empty(tensor.numel() + 4, dtype=tensor.dtype)
    return memory[1 : tensor.numel() + 1].view(tensor.shape).copy_(tensor)


def with_gaps(tensor: Tensor) -> Tensor:
    memory = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    return memory[..., ::2].copy_(tensor)


def replaced(training: Training, name: str, i: int, change: Callable[[Tensor], Tensor]) -> None:
    """One of the call's tensors, of the parameters or of their state is another one; parameters stay what they are."""
    if name == "weights":
        training.weights[i].data = change(training.weights[i].data)
    elif name == "state":
        training.state[i] = change(training.state[i])
    elif name == "error":
        training.change(error=change(training.call.error))
    else:
        tensors = list(getattr(training.call, name))
        tensors[i] = change(tensors[i])
        training.change(**{name: tensors})


EACH = [
    ("error", 0), ("stored", 0), ("inputs", 0), ("inputs", 2), ("saved", 1), ("dropout_mask", 1), ("weights", 0),
    ("weights", 4), ("state", 0), ("state", 5), ("state", 9),
]  # fmt: skip
each_tensor = pytest.mark.parametrize(("name", "i"), EACH)


def test_a_compiled_kernel_gets_every_address() -> None:
    training = Training()
    with standing_in() as (straight, others):
        for _ in range(2):
            training.update()
            given = straight[-1]
            assert {name: given[name] for name in arguments_of(training)} == arguments_of(training)
    assert len(straight) == 2
    assert others == []


@each_tensor
def test_another_tensor_is_noticed(name: str, i: int) -> None:
    training = Training()
    with standing_in() as (straight, others):
        training.update()
        replaced(training, name, i, torch.clone)
        training.update()
    assert {argument: straight[1][argument] for argument in arguments_of(training)} == arguments_of(training)
    assert straight[0] != straight[1]
    assert others == []


@each_tensor
def test_a_tensor_elsewhere_than_at_a_multiple_of_16_bytes_goes_through_the_compiler(name: str, i: int) -> None:
    training = Training()
    with standing_in() as (straight, others):
        training.update()
        replaced(training, name, i, one_further)
        training.update()
    assert len(straight) == len(others) == 1
    assert others[0].problem.projected.error_aligned == (name != "error")


def test_numbers_in_memory_go_as_their_address() -> None:
    """If that is a multiple of 16."""
    training, table = Training(), torch.ones(5, 9)
    with standing_in() as (straight, others):
        for numbers in (table, one_further(table)):
            training.hyper = DeviceNumbers(numbers, range(5))
            training.update()
    assert [given["hyper"] for given in straight] == [(table.data_ptr(),)]
    assert len(others) == 1


def test_other_numbers_are_noticed() -> None:
    """A scheduler's rates, and that of one parameter alone."""
    training = Training()
    assert isinstance(training.hyper, list)
    with standing_in() as (straight, _):
        for rates in ([1e-3] * 5, [1e-4] * 5, [1e-3, 1e-4, 1e-3, 1e-3, 1e-3]):
            training.hyper[::6] = rates
            training.update()
    first, second, third = [given["hyper"] for given in straight]
    assert (len(first), len(second), len(third)) == (7, 7, 14)
    assert third == first + second
    assert (straight[2]["WEIGHT_SETS"], straight[2]["BIAS_SETS"]) == ((0, 7, 0), (0, 0, 0))


@pytest.mark.parametrize("change", [with_gaps, Tensor.half], ids=["gaps", "dtype"])
@pytest.mark.parametrize(("name", "i"), [each for each in EACH if each[0] in ("weights", "state")])
def test_what_the_kernels_cannot_update_goes_to_torch(name: str, i: int, change: Callable[[Tensor], Tensor]) -> None:
    training = Training()
    with standing_in() as (straight, others), patch.object(torch_backend, "update_of_") as updated:
        for way in (change, lambda tensor: tensor.float().contiguous()):
            training.update()
            replaced(training, name, i, way)
        training.update()
    assert (len(straight), len(others), updated.call_count) == (2, 0, 1)


@pytest.mark.parametrize(("name", "i"), [("inputs", 0), ("inputs", 2), ("saved", 1), ("dropout_mask", 1)])
def test_gaps_are_noticed(name: str, i: int) -> None:
    """The kernel gets a copy in place of the tensor."""
    training = Training()
    kept = training.call  # So that the copy cannot get the first tensor's memory.
    with standing_in() as (straight, others):
        training.update()
        replaced(training, name, i, with_gaps)
        training.update()
    assert kept is not training.call
    before, after, found = straight[0][name][i], arguments_of(training)[name][i], straight[1][name][i]
    assert found not in (before, after)
    assert others == []


def test_what_the_kernel_is_made_of_is_noticed() -> None:
    """Shapes, strides, activations, wanted gradients, dropout, and the precision of products."""
    training, seen = Training(), []
    wide, mask = torch.randn(ROWS, 2 * CLASSES), training.call.dropout_mask[1]
    half = [t[: ROWS // 2] for t in (*training.call.inputs, *training.call.saved)]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"error": wide[:, :CLASSES]}, "stride_row"),
        ({"activations": ["tanh", "tanh"]}, "WHICH"),
        ({"parameters": [0.0, 0.0, 0.5, 0.0]}, "p"),
        ({"dropout_mask": [mask, None]}, "DROPOUT"),
        ({"dropout_mask": [None, None]}, "DROPOUT"),
        ({"feedback": dfa.Feedback(seed=7).spec}, "key0"),
        ({"stored": []}, "SOURCE"),
        ({"inputs": half[:3], "saved": half[3:], "error": wide[: ROWS // 2, :CLASSES]}, "rows"),
    ]
    before = torch.backends.cuda.matmul.fp32_precision
    with standing_in() as (straight, _):
        training.update()
        for change, argument in changes:
            training.change(**change)
            training.update()
            seen.append(straight[-2][argument] != straight[-1][argument])
        try:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            training.update()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    assert seen == [True] * len(changes)
    assert straight[-2]["PRECISION"] != straight[-1]["PRECISION"]


def test_what_is_wanted_is_noticed() -> None:
    """Which gradients in which dtype, and which rule they are for."""
    call = Training().call
    weights = [torch.zeros(shape) for shape in ((WIDTH, WIDTH), (WIDTH, WIDTH), (CLASSES, WIDTH))]
    wanted, other = call._replace(bias_grads=[False] * 3), call._replace(weight_grads=[True, False, True])
    numbers = [0.1, 0.5, 0.0, 0.0, 0.2, 0.5, 0.0, 0.0, 0.3, 0.5, 0.0, 0.0]
    with standing_in() as (straight, _):
        for dtype in (torch.float32, torch.float16):
            grads = triton_backend.layer_grads(call, dtype)
            assert {grad.dtype for grad in grads} == {dtype}
            assert straight[-1]["weights"] == addresses([grads[0], grads[1], grads[3]])
        assert len(triton_backend.layer_grads(wanted, torch.float32)) == 3
        assert len(triton_backend.layer_grads(other, torch.float32)) == 4
        triton_backend.layer_update_(wanted, weights, [], "sgd", [0.1, 0.0, 0.0, 0.0] * 3)
        for hyper in (numbers, DeviceNumbers(torch.tensor(numbers).view(3, 4), range(3))):
            triton_backend.layer_update_(wanted, weights, [w.clone() for w in weights], "sgd", hyper)
    assert [given["plan"].problem.parameter_dtype for given in straight[:2]] == [torch.float32, torch.float16]
    assert [given["WEIGHTS"] for given in straight] == [7, 7, 7, 5, 7, 7, 7]
    assert [given["BIASES"] for given in straight] == [6, 6, 0, 6, 0, 0, 0]
    assert [given["RULE"] for given in straight] == ["store"] * 4 + ["sgd", "momentum", "momentum"]
    # For numbers and for an address kernels are compiled apart.
    assert straight[-1]["plan"] is not straight[-2]["plan"]


@pytest.mark.parametrize("missing", ["weights", "state"])
def test_a_tensor_too_few(missing: str) -> None:
    training = Training()
    getattr(training, missing).pop()
    training.hyper = [1e-3, 0.9, 0.999, 1e-8, 0.01, 1.0] * len(training.weights)
    with standing_in() as (straight, _), pytest.raises(ValueError, match="weights, state: got 14 tensors"):
        training.update()
    assert straight == []


def test_a_tensor_that_two_layers_read() -> None:
    training = Training()
    training.change(inputs=[training.call.inputs[0], training.call.saved[0], training.call.inputs[0]])
    with standing_in() as (straight, others):
        for _ in range(2):
            training.update()
            replaced(training, "inputs", 2, torch.clone)
    assert straight[0]["inputs"][0] == straight[0]["inputs"][2] != straight[1]["inputs"][2]
    assert others == []
