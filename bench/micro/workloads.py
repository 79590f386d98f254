"""What is timed: the device, its backends, networks and arithmetics, and random data for them, never zeros."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import dfa_kernels as dfa
from bench.gpu.cases import Case
from bench.micro.definition import Batch
from dfa_kernels.backends import resolve
from dfa_kernels.backends.calls import LayerCall, TapsCall
from dfa_kernels.feedback.spec import KINDS, STORAGES
from dfa_kernels.updates import RULES

Form = tuple[str, str]
"""Kind and storage of feedback."""

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
BACKEND_NAMES = list(dict.fromkeys([resolve("auto", DEVICE), "torch"]))
FORMS = [(kind, storage) for kind in KINDS for storage in STORAGES]
# One of the two half precisions: kernels differ by their widths.
DTYPES = ("float32", "bfloat16")
ARITHMETICS = ("float32", "tf32", "bfloat16") if ON_GPU else DTYPES

# inputs, hidden, depth, classes, batch of the paper's network, a wide one, and one whose error is wide; on a CPU of a
# small one, too, for projections of a very wide one.
SIZES: tuple[tuple[int, int, int, int, int], ...]
if ON_GPU:
    SIZES = ((3072, 800, 3, 10, 128), (784, 4096, 4, 10, 1024), (784, 4096, 2, 1000, 1024))
    WIDEST = (784, 65536, 1, 1000, 32)
else:
    SIZES = ((3072, 800, 3, 10, 128), (784, 1024, 4, 10, 256), (784, 400, 2, 1000, 64), (64, 64, 3, 10, 32))
    WIDEST = (784, 4096, 1, 1000, 16)


def case_of(inputs: int, hidden: int, depth: int, classes: int, batch: int, arithmetic: str) -> Case:
    name = f"{inputs}-{hidden}x{depth}-{classes}-b{batch}-{arithmetic}"
    dtype, tf32 = ("float32", True) if arithmetic == "tf32" else (arithmetic, False)
    return Case(name, inputs, hidden, depth, classes, batch, dtype, tf32)


CASES = [case_of(*size, arithmetic) for size in SIZES for arithmetic in ARITHMETICS]
PROJECTIONS = [*CASES, *(case_of(*WIDEST, arithmetic) for arithmetic in ARITHMETICS)]

# Of stacked marks the lowest varies slowest and begins the test's name.
each_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
each_form = pytest.mark.parametrize("form", FORMS, ids="-".join)


def each_case(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """By name, which is what the JSON can hold; the fixture `case` finds the case."""
    return pytest.mark.parametrize("case", [case.name for case in cases], indirect=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@lru_cache(maxsize=1)
def batch_of(case: Case) -> Batch:
    """As a pass might have left it."""
    saved = [randn(case.batch, case.hidden, seed=layer).tanh() for layer in range(case.depth)]
    x, error = randn(case.batch, case.inputs, seed=case.depth), randn(case.batch, case.classes, seed=case.depth + 1)
    return Batch(error, [x, *saved], saved).to(case.torch_dtype)


def layer_call(case: Case, form: Form) -> LayerCall:
    error, inputs, saved = batch_of(case)
    feedback, n = dfa.Feedback(*form), len(saved)
    stored, all_of_them = feedback.stored(case.hidden, case.classes, DEVICE), [True] * len(inputs)
    return LayerCall(
        error, stored, feedback.spec, inputs, saved, [None] * n, ["tanh"] * n, [0.0] * (2 * n), all_of_them, all_of_them
    )


def taps_call(case: Case, form: Form) -> TapsCall:
    call = layer_call(case, form)
    sizes = [h.shape[1] for h in call.saved]
    return TapsCall(
        call.error, call.stored, call.feedback, sizes, call.saved, call.dropout_mask, call.activations, call.parameters
    )


@lru_cache(maxsize=len(RULES))
def parameters_of(case: Case, rule: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of every layer, smaller than their gradients; the rule's state, as large as these."""
    weights, state = [], []
    for inputs, outputs in itertools.pairwise(case.widths):
        for shape in ((outputs, inputs), (outputs,)):
            weights.append((0.1 * randn(*shape, seed=1)).to(case.torch_dtype))
            for i, name in enumerate(RULES[rule].state):
                values = randn(*shape, seed=2 + i)
                # The squares' mean, of which a root is taken and divided by, is not near zero.
                state.append((values.abs() + 0.5 if name == "exp_avg_sq" else values).to(case.torch_dtype))
    return weights, state
