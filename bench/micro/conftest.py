"""Check, then time; and what a run's JSON says of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import environment
from bench.gpu.cases import Case
from bench.micro.definition import Expected
from bench.micro.workloads import ON_GPU, PROJECTIONS

CheckThenTime = Callable[..., None]


def when_done() -> float:
    """Seconds on the clock when the device has done all that it was given."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "check_then_time" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=when_done))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Of one machine the same each time, or pytest-benchmark warns when it compares: the commit has its own place."""
    # It holds the momentary clock rate.
    machine_info.pop("cpu", None)
    machine_info |= {name: value for name, value in environment.describe().items() if name != "commit"}
    machine_info["device"] = machine_info["gpu"] if ON_GPU else machine_info["processor"]


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return next(case for case in PROJECTIONS if case.name == request.param)


@pytest.fixture
def check_then_time(benchmark: BenchmarkFixture) -> CheckThenTime:
    """Times `run` after what the same call gave, `found`, was held to `expected`; if that is wrong, it fails instead.

    group: the table it stands in; facts: go into the JSON.
    """

    def run_both(
        run: Callable[[], object], found: Sequence[Tensor], right: Expected, group: str, **facts: object
    ) -> None:
        error, allowed = right.check(found)
        benchmark.group = group
        benchmark.extra_info |= {"error": error, "allowed": allowed, **facts}
        benchmark(run)

    return run_both
