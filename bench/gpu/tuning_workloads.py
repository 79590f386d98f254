"""What tile configs are tuned on: calls of the operators, and whether their results are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.cases import Case, Problem, make_problem
from bench.gpu.forced import Config, gradient_tiles, with_config
from bench.gpu.kernel_times import Operator, make_operator
from bench.gpu.precision import TruncatedProducts, tf32
from bench.gpu.reference import make_reference
from dfa_kernels.backends import torch_backend
from dfa_kernels.backends import triton as triton_backend
from dfa_kernels.backends.calls import LayerCall, TapsCall
from dfa_kernels.backends.triton.configs import DeltasConfig, ProjectionConfig
from dfa_kernels.backends.triton.launch import target_of
from dfa_kernels.backends.triton.launch_plan import LaunchPlan
from dfa_kernels.backends.triton.route import looks_of, route_of

Shape = tuple[int, int, int, int, int]
"""inputs, hidden, depth, size of the error, batch."""

DTYPES = {"half": "bfloat16", "tf32": "float32", "ieee": "float32"}
SHAPES: dict[str, tuple[Shape, ...]] = {
    "strip": ((3072, 800, 3, 10, 128), (1024, 1024, 8, 10, 128), (784, 512, 20, 10, 256)),
    "two_phase": (
        (3072, 800, 3, 1000, 128),
        (784, 512, 20, 1000, 256),
        (784, 4096, 4, 1000, 1024),
        (784, 8192, 4, 10, 4096),
    ),
    "deltas": ((784, 2048, 4, 10, 512), (784, 4096, 4, 10, 1024), (784, 8192, 4, 10, 4096)),
    "grouped_gemm": ((784, 2048, 4, 10, 512), (784, 4096, 4, 10, 1024), (784, 8192, 4, 10, 4096)),
    "project_taps": ((3072, 800, 3, 10, 128), (784, 4096, 4, 10, 1024), (784, 4096, 4, 1000, 1024)),
}
QUICK_SHAPE: Shape = (24, 20, 2, 12, 10)


@dataclass
class Workload:
    """One call that candidates are timed on, and what tells whether they are right."""

    name: str
    run: Callable[[], list[Tensor]]
    is_right: Callable[[Sequence[Tensor]], bool]
    tiles: Callable[[Config], int]
    """Of a config; a GPU is filled by as many as it has multiprocessors."""


def shapes_of(kernel: str, quick: bool) -> tuple[Shape, ...]:
    return (QUICK_SHAPE,) if quick else SHAPES[kernel]


def problem_of(arithmetic: str, shape: Shape, device: torch.device) -> Problem:
    inputs, hidden, depth, classes, batch = shape
    name = f"{inputs}-{hidden}x{depth}-{classes} b={batch} {arithmetic}"
    case = Case(name, inputs, hidden, depth, classes, batch, DTYPES[arithmetic], tf32=arithmetic == "tf32")
    return make_problem(case, device, "triton")


def make_workload(kernel: str, arithmetic: str, shape: Shape, device: torch.device) -> Workload:
    problem = problem_of(arithmetic, shape, device)
    return _taps(problem) if kernel == "project_taps" else _grouped(problem)


def run_of(kernel: str, problem: Problem) -> Callable[[], list[Tensor]]:
    """The call that is timed."""
    operator = make_operator(problem)
    if kernel != "project_taps":
        return operator.grads
    call = taps_call(operator.call, problem.case.torch_dtype)
    return lambda: triton_backend.project_taps(call)


def taps_call(layers: LayerCall, dtype: torch.dtype) -> TapsCall:
    """δ of every hidden layer, as for layers that autograd finishes."""
    saved = [h.to(dtype) for h in layers.saved]
    return TapsCall(
        layers.error.to(dtype), layers.stored, layers.feedback, [h.shape[1] for h in saved], saved, layers.dropout_mask,
        layers.activations, layers.parameters,
    )  # fmt: skip


def _grouped(problem: Problem) -> Workload:
    operator, reference = make_operator(problem), make_reference(problem, "DFA", given_error=True)

    def is_right(found: Sequence[Tensor]) -> bool:
        return reference.deviation(found, updated=False).correct

    def tiles(config: Config) -> int:
        if isinstance(config, DeltasConfig):
            return _projection_tiles(problem.case, config)
        return gradient_tiles(plan_of(operator, config))

    return Workload(problem.case.name, operator.grads, is_right, tiles)


def plan_of(operator: Operator, config: Config) -> LaunchPlan:
    """What a grouped launch with this config looks like."""
    looks, target = looks_of(operator.call, operator.dtype, "store"), target_of(operator.call.error.device)
    with with_config(config):
        plan = route_of(looks, target).plan
    assert plan is not None
    return plan


def _taps(problem: Problem) -> Workload:
    layers, case = make_operator(problem).call, problem.case
    call = taps_call(layers, case.torch_dtype)
    exact = torch_backend.project_taps(taps_call(layers, torch.float64))
    plain = [torch_backend.project_taps(call)]
    if case.tf32:
        with tf32(False), TruncatedProducts():
            plain.append(torch_backend.project_taps(call))

    def is_right(found: Sequence[Tensor]) -> bool:
        return all(
            _distance(out, ref) <= 2 * max(_distance(p[i], ref) for p in plain) + _tiny(out, ref)
            for i, (out, ref) in enumerate(zip(found, exact, strict=True))
        )

    def tiles(config: Config) -> int:
        assert isinstance(config, ProjectionConfig)
        return _projection_tiles(case, config)

    return Workload(case.name, lambda: triton_backend.project_taps(call), is_right, tiles)


def _projection_tiles(case: Case, config: ProjectionConfig) -> int:
    return -(-case.hidden // config.block_u) * -(-case.batch // config.block_r)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).abs().max())


def _tiny(out: Tensor, ref: Tensor) -> float:
    return 4 * torch.finfo(out.dtype).eps * float(ref.abs().max())
