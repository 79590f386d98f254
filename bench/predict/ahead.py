"""Compiles the kernels for GPUs that are not here: from a case to a plan, and from a plan to machine code.

Triton's own compiler and its copy of ptxas do this without a driver. What the machine code is like, `sass.py` reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dfa_kernels.backends.triton import producer
from dfa_kernels.backends.triton.configs import table
from dfa_kernels.backends.triton.kernels.hadamard_tile import hadamard_kernel
from dfa_kernels.backends.triton.launch_plan import LaunchPlan
from dfa_kernels.backends.triton.plan_gemm import MOST_VIEWS, choose_configs, plan_grouped_gemm, walks
from dfa_kernels.backends.triton.plan_small import plan_strip
from dfa_kernels.backends.triton.plan_taps import plan_projection
from dfa_kernels.backends.triton.plan_wide import plan_two_phase
from dfa_kernels.backends.triton.problem import GroupedProblem, Projected, TapsProblem, Target
from dfa_kernels.backends.triton.transform import programs_ahead, tile_of, transform_options
from dfa_kernels.feedback.kinds import FEEDBACK_KINDS
from dfa_kernels.feedback.spec import FeedbackSpec
from dfa_kernels.updates import RULES

MULTIPROCESSORS = 100
PRODUCER = "grouped_gemm_producer"
DTYPES = {"fp32": torch.float32, "ieee": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int8: "*i8"
}  # fmt: skip
STORED = {"projection": ("*fp32",)} | {
    kind.stored_source: tuple(POINTERS[dtype] for _, dtype in kind.layout(FeedbackSpec(kind.name), 1))
    for kind in FEEDBACK_KINDS.values()
}
# A feedback whose U the kernels get from there; of several, the first kind's.
FEEDBACKS = {"projection": FeedbackSpec("fastfood")} | {
    source: FeedbackSpec(kind.name, storage)
    for kind in reversed(FEEDBACK_KINDS.values())
    for source, storage in ((kind.stored_source, "dense"), (kind.seed_source, "procedural"))
    if source
}
BLOCKS = (FEEDBACK_KINDS["fastfood"].stored_source, FEEDBACK_KINDS["fastfood"].seed_source)
# Widths of the network's input and hidden layers: multiples of 16 bytes, of 4 and of 2 in half precision.
WIDTHS = {"even": (3070, 802), "odd": (3071, 801)}


@dataclass(frozen=True)
class Case:
    """A kernel for a problem, not yet compiled."""

    kernel: str
    config: int
    dtype: str
    rule: str = "store"
    source: str = "matrix"
    error_size: int = 10
    network: str = "aligned"
    rows: int = 1024
    numbers_in_memory: bool = False

    @property
    def name(self) -> str:
        about = f"{self.kernel} {self.config} {self.dtype} {self.rule} {self.source} E={self.error_size} {self.network}"
        about += " numbers in memory" * self.numbers_in_memory
        return about if self.rows == 1024 else f"{about} rows={self.rows}"

    @property
    def multiplies(self) -> bool:
        """Whether there is a matrix product in it: a sparse U is summed up, a given P only read, a small error too."""
        how = projected(self)
        if self.kernel in ("project_taps", "deltas"):
            return how.tile in ("entries", "signs") and not (self.kernel == "deltas" and walks(how))
        return True


def projected(case: Case) -> Projected:
    dtype = torch.float32 if case.source == "projection" else DTYPES[case.dtype]
    strides = (case.error_size, 1)
    return Projected(
        case.rows,
        case.error_size,
        strides,
        dtype,
        FEEDBACKS[case.source],
        case.source,
        DTYPES[case.dtype],
        True,
        case.dtype == "fp32",
    )


def grouped(case: Case) -> GroupedProblem:
    """The paper's network, all gradients wanted, parameters in float32 unless they are to be `half`.

    A `deep` one has as many layers as `grouped_gemm_producer` takes.
    """
    width, hidden = WIDTHS.get(case.network, (3072, 800))
    layers = producer.MOST_LAYERS if case.network == "deep" else 4
    activations = ("tanh", "relu", "gelu") if case.network == "activations" else ("tanh",) * (layers - 1)
    return GroupedProblem(
        projected(case),
        (width, *(hidden,) * (layers - 1)),
        (*(hidden,) * (layers - 1), case.error_size),
        (4 if case.network == "positions" else 1,) * layers,
        activations,
        (0.0,) * (2 * layers - 2),
        0b111 if case.network == "dropout_mask" else 0,
        2**layers - 1,
        2**layers - 1,
        DTYPES[case.dtype] if case.network == "half" else torch.float32,
        case.rule,
        (0,) * layers,
        (0,) * layers,
    )


def taps(case: Case) -> TapsProblem:
    """Two convolutions' taps, the second in channels-last order with dropout."""
    return TapsProblem(projected(case), (16384, 8192), (16, 32), ("relu",) * 2, (0.0,) * 4, 0b11, 0b10, 0b10)


def planned(case: Case, arch: int) -> LaunchPlan:
    """The plan with the config asked for."""
    if case.kernel == PRODUCER:
        return _planned_in_two(case, producer.CONFIG, Target(arch, MULTIPROCESSORS))
    config = getattr(table()[arch][projected(case).arithmetic], case.kernel)[case.config]
    if case.kernel in ("deltas", "grouped_gemm"):
        return _planned_in_two(case, config, Target(arch, MULTIPROCESSORS))
    if case.kernel == "project_taps":
        return plan_projection(taps(case), config)
    if case.kernel == "strip":
        return plan_strip(grouped(case), config, Target(arch, MULTIPROCESSORS))
    return plan_two_phase(grouped(case), config, Target(arch, MULTIPROCESSORS))


def _planned_in_two(case: Case, config: Any, target: Target) -> LaunchPlan:
    """The launch asked for, of both."""
    problem = grouped(case)
    gemm, tiles = choose_configs(problem, target)
    if case.kernel.startswith("grouped_gemm"):
        return plan_grouped_gemm(problem, config, tiles, target)
    first = plan_grouped_gemm(problem, gemm, config if walks(problem.projected) else tiles, target).first
    assert first is not None
    return first


def types_of(plan: LaunchPlan, numbers_in_memory: bool) -> tuple[list[Any], tuple[Any, ...]]:
    """The types of the launch's tensors, and its numbers."""
    problem = plan.problem
    how = problem.projected
    error, x = POINTERS[how.error_dtype], POINTERS[how.dtype]
    stored = STORED.get(how.source, (error,))
    if isinstance(problem, TapsProblem):
        each = (x,) * len(problem.sizes)
        return [error, stored, each, each, each], plan.numbers
    layers, hidden = len(problem.widths_in), problem.hidden
    tensors = [error, stored, (x,) * layers, (x,) * hidden, (x,) * hidden]
    if plan.name == "deltas":
        return [*tensors[:2], *tensors[3:], x, x, "*fp32"], plan.numbers
    if plan.name.startswith("grouped_gemm"):
        tensors = _factor_types(plan, x, layers)
    if plan.counters:
        tensors = ["*i32", *tensors, (x,) * layers, "*fp32"]
    tensors += [(POINTERS[problem.parameter_dtype],) * layers] * 6
    if problem.rule == "store":
        return tensors, (*plan.numbers, (0.5,))
    if numbers_in_memory:
        return tensors, (*plan.numbers, ("*fp32",))
    numbers_of = RULES[problem.rule].tile_numbers
    return tensors, (*plan.numbers, numbers_of(*(0.5,) * len(inspect.signature(numbers_of).parameters)))


def _factor_types(plan: LaunchPlan, x: str, layers: int) -> list[Any]:
    """Of δ, the output layer's δ, the inputs together and one by one, and the sums."""
    if not plan.uses_tma:
        return [x, x, (x,) * layers, *(x,) * MOST_VIEWS, "*fp32"]
    m, n, k = (plan.arguments[f"BLOCK_{side}"] for side in "MNK")
    delta, view = (_descriptor_type(plan, x[1:], tile) for tile in ([1, k, m], [k, n]))
    return [delta, delta, (x,), *(view,) * MOST_VIEWS, "*fp32"]


def _descriptor_type(plan: LaunchPlan, dtype: str, tile: list[int]) -> str:
    if plan.name != PRODUCER:
        return f"tensordesc<{dtype}{tile}>"
    from dfa_kernels.backends.triton.kernels.grouped_gemm_producer import shared_layout

    return f"tensordesc<{dtype}{tile},{shared_layout(len(tile))!r}>"


def _kind_of_source(plan: LaunchPlan) -> Any:
    if plan.name != PRODUCER:
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def source_of(plan: LaunchPlan, numbers_in_memory: bool = False) -> ASTSource:
    """Specialised as a launch on torch's tensors is: every address a multiple of 16, the error's columns adjacent.

    But for the numbers in tuples, which a launch specialises as well: on being 1, and on being a multiple of 16.
    """
    tensors, numbers = types_of(plan, numbers_in_memory)
    names = plan.kernel.arg_names
    constants = {name: value for name, value in plan.arguments.items() if name.isupper()}
    runtime = [name for name in names if name not in constants]
    signature = dict(zip(runtime, [*tensors, *map(_number_type, numbers)], strict=True))
    # 1 is a constant to the compiler.
    ones = {"stride_column": 1} if "stride_column" in names else {}
    constexprs = {(names.index(name),): value for name, value in (constants | ones).items()}
    signature |= dict.fromkeys([*constants, *ones], "constexpr")
    return _kind_of_source(plan)(
        fn=plan.kernel,
        signature={name: signature[name] for name in names},
        constexprs=constexprs,
        attrs={path: [["tt.divisibility", 16]] for path in _pointers(names, signature)},
    )


def _number_type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_number_type, value))
    if isinstance(value, str):
        return value
    return "fp32" if isinstance(value, float) else "i32"


def _pointers(names: list[str], signature: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    for i, name in enumerate(names):
        kind = signature[name]
        if isinstance(kind, tuple):
            yield from ((i, j) for j, each in enumerate(kind) if each.startswith("*"))
        elif kind.startswith("*"):
            yield (i,)


def hadamard_source(length: int, dtype: torch.dtype, arch: int) -> tuple[ASTSource, dict[str, Any]]:
    """The transform of many rows of `length` numbers, and what the compiler is told."""
    names = hadamard_kernel.arg_names
    _, rows = tile_of(length)
    ahead = programs_ahead(length, dtype, arch)
    constants = {"BLOCK": rows, "BITS": length.bit_length() - 1, "AHEAD": ahead > 0}
    types = {"x": POINTERS[dtype], "out": POINTERS[dtype], "rows": "i32", "n": "i32", "scale": "fp32"}
    source = ASTSource(
        fn=hadamard_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("x", "out", "n")[: 2 + (length >= 16)]},
    )
    return source, transform_options(length, ahead)


def compiled(source: ASTSource, options: dict[str, Any], arch: int) -> Any:
    """Triton's compiled kernel; whatever Triton and ptxas raise for one that does not compile."""
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
