"""`Feedback.project`, which has no backends to choose from."""

from __future__ import annotations

from functools import lru_cache

import dfa_kernels as dfa
from bench.gpu.cases import Case
from bench.gpu.precision import tf32
from bench.micro.conftest import CheckThenTime
from bench.micro.definition import Expected, expected, feedback_matrix, projected
from bench.micro.workloads import DEVICE, PROJECTIONS, Form, batch_of, each_case, each_form


@each_form
@each_case(PROJECTIONS)
def test_project(case: Case, form: Form, check_then_time: CheckThenTime) -> None:
    error, feedback = batch_of(case).error, dfa.Feedback(*form)
    right = right_projection(case, form[0])
    with tf32(case.tf32):
        found = [feedback.project(error, case.hidden)]
        check_then_time(lambda: feedback.project(error, case.hidden), found, right, f"Feedback.project {case.name}")


@lru_cache(maxsize=1)
def right_projection(case: Case, kind: str) -> Expected:
    error, U = batch_of(case).error, feedback_matrix(kind, case.hidden, case.classes, DEVICE)
    return expected(lambda dtype: [projected(error.to(dtype), U, case.hidden)], case.torch_dtype, case.tf32)
