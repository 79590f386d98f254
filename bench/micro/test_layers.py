"""`layer_grads`, `layer_update_` by every rule and `project_taps`, on the layers of whole networks."""

from __future__ import annotations

from functools import lru_cache

import pytest

from bench.gpu.cases import Case
from bench.gpu.precision import tf32
from bench.micro.conftest import CheckThenTime
from bench.micro.definition import STEPS_BEFORE, Expected, deltas, expected, feedback_matrix, gradients, updated
from bench.micro.workloads import (
    CASES,
    DEVICE,
    PROJECTIONS,
    Form,
    batch_of,
    each_backend,
    each_case,
    each_form,
    layer_call,
    parameters_of,
    taps_call,
)
from dfa_kernels.backends import BACKENDS

CHECKED_LR, TIMED_LR = 1.0, 1e-4
"""A step that no rounding hides, and one that can be repeated."""
HYPER = {
    "sgd": (0.0, 0.0, 0.0),
    "momentum": (0.9, 0.0, 0.0),
    "adamw": (0.9, 0.999, 1e-8, 1e-2, STEPS_BEFORE + 1.0),
}
"""What follows the learning rate; the optimizers of `definition` have the same."""


@each_backend
@each_form
@each_case(CASES)
def test_layer_grads(case: Case, form: Form, backend: str, check_then_time: CheckThenTime) -> None:
    call, dtype, run = layer_call(case, form), case.torch_dtype, BACKENDS[backend]
    right = right_gradients(case, form[0])
    with tf32(case.tf32):
        check_then_time(
            lambda: run.layer_grads(call, dtype), run.layer_grads(call, dtype), right, f"layer_grads {case.name}",
            runs=run.describe_layers(call, dtype, "store", DEVICE),
        )  # fmt: skip


@each_backend
@pytest.mark.parametrize("rule", HYPER)
@each_form
@each_case(CASES)
def test_layer_update_(case: Case, form: Form, rule: str, backend: str, check_then_time: CheckThenTime) -> None:
    call, run = layer_call(case, form), BACKENDS[backend]
    right = right_update(case, form[0], rule)
    weights, state = ([tensor.clone() for tensor in some] for some in parameters_of(case, rule))

    def update(lr: float) -> None:
        run.layer_update_(call, weights, state, rule, (lr, *HYPER[rule]) * len(weights))

    with tf32(case.tf32):
        update(CHECKED_LR)
        found = [tensor.clone() for tensor in (*weights, *state)]
        check_then_time(
            lambda: update(TIMED_LR), found, right, f"layer_update_ {rule} {case.name}",
            runs=run.describe_layers(call, case.torch_dtype, rule, DEVICE),
        )  # fmt: skip


@each_backend
@each_form
@each_case(PROJECTIONS)
def test_project_taps(case: Case, form: Form, backend: str, check_then_time: CheckThenTime) -> None:
    call, run = taps_call(case, form), BACKENDS[backend]
    right = right_deltas(case, form[0])
    with tf32(case.tf32):
        check_then_time(
            lambda: run.project_taps(call), run.project_taps(call), right, f"project_taps {case.name}",
            runs=run.describe_taps(call, DEVICE),
        )  # fmt: skip


# Both storages hold the same U, and every backend has the same to give.
@lru_cache(maxsize=1)
def right_gradients(case: Case, kind: str) -> Expected:
    batch, U = batch_of(case), feedback_matrix(kind, case.hidden, case.classes, DEVICE)
    return expected(lambda dtype: gradients(batch.to(dtype), U), case.torch_dtype, case.tf32)


@lru_cache(maxsize=len(HYPER))
def right_update(case: Case, kind: str, rule: str) -> Expected:
    batch, U = batch_of(case), feedback_matrix(kind, case.hidden, case.classes, DEVICE)
    weights, state = parameters_of(case, rule)
    return expected(
        lambda dtype: updated(rule, weights, state, gradients(batch.to(dtype), U), CHECKED_LR),
        case.torch_dtype, case.tf32,
    )  # fmt: skip


@lru_cache(maxsize=1)
def right_deltas(case: Case, kind: str) -> Expected:
    batch, U = batch_of(case), feedback_matrix(kind, case.hidden, case.classes, DEVICE)
    return expected(lambda dtype: deltas(batch.to(dtype), U), case.torch_dtype, case.tf32)
