"""`hadamard_transform`, from the shortest to the longest that one launch takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.micro.conftest import CheckThenTime
from bench.micro.definition import butterfly, expected
from bench.micro.workloads import DTYPES, ON_GPU, each_backend, randn
from dfa_kernels.backends import BACKENDS

NUMBERS = 2**26 if ON_GPU else 2**20


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [64, 1024, 4096, 32768])
def test_hadamard_transform(n: int, dtype: str, backend: str, check_then_time: CheckThenTime) -> None:
    x = randn(NUMBERS // n, n).to(getattr(torch, dtype))
    run = BACKENDS[backend].hadamard

    def transform(precision: torch.dtype) -> list[Tensor]:
        """Narrow numbers are summed in float32."""
        wide = torch.promote_types(precision, torch.float32)
        return [butterfly(x.to(wide)).to(precision)]

    check_then_time(lambda: run(x), [run(x)], expected(transform, x.dtype), f"hadamard_transform {n}")
