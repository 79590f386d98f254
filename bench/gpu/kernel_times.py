"""The device's ceilings, the grouped kernels beside the library's products and their floor, and the host's part."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import Case, Problem
from bench.gpu.clock import Clock, in_turn
from bench.gpu.forced import PRODUCER, PRODUCTS, kernel_planner
from bench.gpu.graphs import Work, captured, nothing
from bench.gpu.precision import tf32
from bench.gpu.reference import Reference
from bench.gpu.regions import BP, EVERYWHERE, OURS, STEP, ByHand
from dfa_kernels.backends import BACKENDS, cuda, resolve
from dfa_kernels.backends.calls import LayerCall
from dfa_kernels.backends.triton import producer
from dfa_kernels.backends.triton.route import planned_by

# Rows for which every card's table has strips.
LARGEST_STRIPS = 128
LIBRARY, CHOSEN, CUDA = "cuBLAS, weight gradients alone", "layer_grads", "CUDA C++"
SMALLEST_WIDE = 2048
"""Units of hidden layers from which on launches that begin with `deltas` are compared as well."""
HOST_CALLS, HOST_QUEUE, WARM_UP = 1000, 50, 5


def ceilings(clock: Clock, device: torch.device, quick: bool) -> dict[str, float]:
    """Bytes a second of a large copy, read and written; operations a second of large products of random data."""
    source = torch.randn(2**16 if quick else 2**28, device=device)
    target = torch.empty_like(source)
    found = {"bytes": 2 * source.nbytes / _best(clock, lambda: target.copy_(source))}
    n = 128 if quick else 8192
    for name, dtype, allowed in (
        ("bfloat16", torch.bfloat16, False), ("tf32", torch.float32, True), ("float32", torch.float32, False),
    ):  # fmt: skip
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        with tf32(allowed):
            found[name] = 2 * n**3 / _best(clock, partial(torch.mm, a, b, out=out))
    return found


def _best(clock: Clock, run: Work) -> float:
    return statistics.median(in_turn({"": lambda: clock.once(run, waits_for_host=False)}, 2.0, most=10)[""])


def floors(case: Case, ceiling: dict[str, float]) -> dict[str, float]:
    """The least seconds that a backward pass by DFA can take, by its products and by its memory traffic."""
    arithmetic = "tf32" if case.tf32 else case.dtype
    return {
        "products": (case.weight_flops + case.projection_flops) / ceiling[arithmetic],
        "memory": case.backward_bytes / ceiling["bytes"],
    }


@dataclass
class Operator:
    """The call of `layer_grads` for a problem, from a forward pass."""

    call: LayerCall
    backend: str
    dtype: torch.dtype

    def grads(self) -> list[Tensor]:
        return BACKENDS[self.backend].layer_grads(self.call, self.dtype)

    def describe(self) -> str:
        return BACKENDS[self.backend].describe_layers(self.call, self.dtype, "store", self.call.error.device)


def make_operator(problem: Problem) -> Operator:
    hand = ByHand(problem, 0.0)
    hand.forward()
    case, feedback, hidden = problem.case, problem.feedback(), len(hand.layers) - 1
    stored = feedback.stored(case.hidden, case.classes, problem.device)
    wanted = [True] * len(hand.layers)
    call = LayerCall(
        problem.error, stored, feedback.spec, hand.outputs[:-1], hand.outputs[1:-1], [None] * hidden, ["tanh"] * hidden,
        [0.0] * (2 * hidden), wanted, wanted,
    )  # fmt: skip
    return Operator(call, resolve(problem.backend, problem.device), case.torch_dtype)


def compare_kernels(problem: Problem, reference: Reference, clock: Clock, seconds: float) -> dict[str, Any]:
    """Of `layer_grads` as it is chosen, each of its kernels, and the library's products. Device time, cold cache."""
    operator, rows, runs = make_operator(problem), {}, {}
    for name, context in _ways(problem, operator):
        with context:
            rows[name], run = _checked(problem, operator, reference)
        if run is not None:
            runs[name] = run
    if by_cuda := in_cuda(problem, operator):
        rows[CUDA], run = _checked(problem, by_cuda, reference)
        rows[CUDA]["plan"] = by_cuda.describe()
        if run is not None:
            runs[CUDA] = run
    runs[LIBRARY] = _on_device(problem, _library_products(problem))
    rows[LIBRARY] = {"correct": True}
    rows[CHOSEN]["plan"] = operator.describe()
    measures = {name: _once(clock, run) for name, run in runs.items()}
    for name, values in in_turn(measures, seconds).items():
        rows[name]["seconds"] = statistics.median(values)
    return rows


def in_cuda(problem: Problem, operator: Operator) -> Operator | None:
    """The same call by the CUDA C++ kernels, if there is a library that has code for this GPU."""
    if not problem.on_gpu:
        return None
    major, minor = torch.cuda.get_device_capability(problem.device)
    return None if cuda.why_not(10 * major + minor) else replace(operator, backend="cuda")


def run_every_kernel(problem: Problem) -> None:
    """Once each, so that they are compiled."""
    operator = make_operator(problem)
    for _, context in _ways(problem, operator):
        with context:
            operator.grads()


def _ways(problem: Problem, operator: Operator) -> list[tuple[str, AbstractContextManager[None]]]:
    ways: list[tuple[str, AbstractContextManager[None]]] = [(CHOSEN, nullcontext())]
    if operator.backend == "triton":
        fits = problem.case.batch <= LARGEST_STRIPS
        ways += [("strip", planned_by(kernel_planner("strip")))] if fits else []
        ways += [("two_phase", planned_by(kernel_planner("two_phase")))]
        wide = ["grouped_gemm", PRODUCTS] if problem.case.hidden >= SMALLEST_WIDE else []
        if wide and not producer.NO_GLUON and torch.cuda.get_device_capability(problem.device) == (9, 0):
            wide.append(PRODUCER)
        ways += [(kernel, planned_by(kernel_planner(kernel))) for kernel in wide]
    return ways


def _checked(problem: Problem, operator: Operator, reference: Reference) -> tuple[dict[str, Any], Work | None]:
    try:
        row = reference.check(operator.grads, updated=False).row()
        return row, _on_device(problem, operator.grads) if row["correct"] else None
    except Exception as failure:
        return {"correct": False, "reason": first_line(failure)}, None


def _on_device(problem: Problem, run: Work) -> Work:
    return captured(run) if problem.on_gpu else run


def _once(clock: Clock, run: Work) -> Callable[[], float]:
    return lambda: clock.once(run, waits_for_host=False)


def _library_products(problem: Problem) -> Work:
    hand = ByHand(problem, 0.0)
    hand.forward()
    factors = [(delta.t(), x, torch.empty_like(layer.weight)) for layer, delta, x in hand.products(problem.error)]

    @torch.no_grad()
    def run() -> None:
        for delta, x, out in factors:
            torch.mm(delta, x, out=out)

    return run


def host_seconds(problem: Problem, reference: Reference, clock: Clock, calls: int = HOST_CALLS) -> dict[str, Any]:
    """Mean time until a call returns, without waiting for the device, whose queue never fills up."""
    operator = make_operator(problem)
    found = reference.check(operator.grads, updated=False).row()
    if not found["correct"]:
        return found
    found[CHOSEN] = mean_host_seconds(clock, operator.grads, calls)
    if by_cuda := in_cuda(problem, operator):
        found[f"{CHOSEN}, {CUDA}"] = mean_host_seconds(clock, by_cuda.grads, calls)
    for name in (OURS, BP):
        for region, made in EVERYWHERE[name](problem, 1e-4).items():
            found[f"{name}, {region}"] = mean_host_seconds(clock, made.run, max(1, calls // 5), made.prepare)
            if region == STEP:
                found[f"{name}, {region}, device included"] = clock.burst(made.run, max(1, calls // 5))
    return found


def mean_host_seconds(clock: Clock, run: Work, calls: int, prepare: Work = nothing) -> float:
    total = 0.0
    for i in range(-WARM_UP, calls):
        if i % HOST_QUEUE == 0:
            clock.synchronize()
        prepare()
        seconds = clock.host(run)
        total += seconds if i >= 0 else 0.0
    clock.synchronize()
    return total / calls


def first_line(failure: BaseException) -> str:
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:300]
