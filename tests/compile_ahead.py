"""Compiles the kernels for GPUs that are not here and prints, as a JSON line each, what the machine code is like.

    python tests/compile_ahead.py sm_90                     everything
    python tests/compile_ahead.py sm_90 --first             the first config of every kernel only
    python tests/compile_ahead.py sm_90 --select two_phase  cases whose name contains this

A program of its own, because it needs real kernels where the other tests need interpreted ones, and because it runs
under several versions of Triton.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dfa_kernels.backends.triton.configs import Configs, ProjectionConfig, table
from dfa_kernels.backends.triton.epilogue import NUMBERS
from dfa_kernels.backends.triton.plan import (
    GroupedProblem,
    LaunchPlan,
    Projected,
    TapsProblem,
    Target,
    plan_one_phase,
    plan_taps,
    plan_two_phase,
)
from dfa_kernels.feedback_spec import FeedbackSpec

MULTIPROCESSORS = 100
DTYPES = {"fp32": torch.float32, "ieee": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
STORED = {
    "matrix": ("*fp32",), "signs": ("*i32",), "sparse": ("*i32", "*i8"), "projection": ("*fp32",),
}  # fmt: skip
KINDS = {"matrix": "gaussian", "signs": "rademacher", "sparse_seed": "sparse", "projection": "fastfood"}
SOURCES = ("matrix", "signs", "sparse", "gaussian", "uniform", "rademacher", "sparse_seed", "projection")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "cp.async": r"\bcp\.async\.c[ag]\.shared",
}
# Where every source of U and every unusual network is compiled: the oldest and the newest kind of tensor core with
# the least registers to spare, in both precisions.
THOROUGH = {(86, "bf16"), (86, "fp32"), (90, "bf16"), (100, "fp32")}


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

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.config} {self.dtype} {self.rule} {self.source} E={self.error_size} {self.network}"


def cases(arch: int, first_only: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        configs = table()[arch]["ieee" if dtype == "ieee" else "tf32" if dtype == "fp32" else "half"]
        yield from _tables(dtype, configs, first_only)
        if first_only or dtype == "ieee":
            continue
        one, two = Case("one_phase", 0, dtype), Case("two_phase", 0, dtype, error_size=1000)
        for case in (one, two):
            yield from (replace(case, rule=rule) for rule in ("sgd", "momentum", "adamw"))
        if (arch, dtype) in THOROUGH:
            yield from _unusual(one, two)
        elif dtype == "bf16":
            yield from (replace(case, source="gaussian") for case in (one, two))


def _tables(dtype: str, configs: Configs, first_only: bool) -> Iterator[Case]:
    """Every config with plain gradients. The output layer's error goes through a copy where its rows are unaligned."""
    for kernel, error_sizes in {"one_phase": (10,), "two_phase": (1000, 10), "project_taps": (1000,)}.items():
        for config in range(1 if first_only else len(getattr(configs, kernel))):
            for error_size in error_sizes[: 1 if config else None]:
                yield Case(kernel, config, dtype, error_size=error_size)


def _unusual(one: Case, two: Case) -> Iterator[Case]:
    taps = replace(two, kernel="project_taps")
    for case in (one, two, taps):
        yield from (replace(case, source=source) for source in SOURCES[1:])
    for case in (one, two):
        yield from (replace(case, network=network) for network in ("unaligned", "noise", "positions", "activations"))


def projected(case: Case) -> Projected:
    feedback = FeedbackSpec(KINDS.get(case.source, case.source), "dense" if case.source in STORED else "procedural")
    dtype = torch.float32 if case.source == "projection" else DTYPES[case.dtype]
    strides = (case.error_size, 1)
    return Projected(
        1024, case.error_size, strides, dtype, feedback, case.source, DTYPES[case.dtype], case.dtype == "fp32"
    )


def grouped(case: Case) -> GroupedProblem:
    """The paper's network, all gradients wanted, float32 parameters."""
    unaligned = case.network == "unaligned"
    hidden = 801 if unaligned else 800
    activations = ("tanh", "relu", "gelu") if case.network == "activations" else ("tanh",) * 3
    return GroupedProblem(
        projected(case),
        (3071 if unaligned else 3072, *(hidden,) * 3),
        (*(hidden,) * 3, case.error_size),
        (4 if case.network == "positions" else 1,) * 4,
        activations,
        (0.0,) * 6,
        0b111 if case.network == "noise" else 0,
        0b1111,
        0b1111,
        torch.float32,
        case.rule,
        (0,) * 4,
        (0,) * 4,
    )


def taps(case: Case) -> TapsProblem:
    """Two convolutions' taps, the second in channels-last order with dropout."""
    return TapsProblem(projected(case), (16384, 8192), (16, 32), ("relu",) * 2, (0.0,) * 4, 0b11, 0b10, 0b10)


def planned(case: Case, arch: int) -> tuple[LaunchPlan, list[Any], tuple[Any, ...]]:
    """The plan with the config asked for, the types of its tensors, and its numbers."""
    target = Target(arch, MULTIPROCESSORS)
    how = projected(case)
    error, x = POINTERS[how.error_dtype], POINTERS[how.dtype]
    stored = STORED.get(case.source, (error,))
    config = getattr(table()[arch][how.arithmetic], case.kernel)[case.config]
    if case.kernel == "project_taps":
        plan = _with_config(plan_taps(taps(case), target), config)
        return plan, [error, stored, (x, x), (x, x), (x, x)], plan.numbers
    problem = grouped(case)
    layers, hidden = len(problem.widths_in), problem.hidden
    tensors = [error, stored, (x,) * layers, (x,) * hidden, (x,) * hidden]
    if case.kernel == "one_phase":
        plan = plan_one_phase(problem, config)
    else:
        plan = plan_two_phase(problem, config, target)
        tensors = ["*i32", *tensors, (x,) * layers]
    tensors += [(POINTERS[problem.parameter_dtype],) * layers] * 6
    return plan, tensors, (*plan.numbers, (0.5,) * max(NUMBERS[case.rule], 1))


def _with_config(plan: LaunchPlan, config: ProjectionConfig) -> LaunchPlan:
    """plan_taps picks the config by itself."""
    constants = plan.constants_by_name()
    constants |= dict(BLOCK_U=config.block_u, BLOCK_R=config.block_r, BLOCK_E=config.block_e)
    return replace(plan, config=config, constants=tuple(constants.values()))


def compile_plan(plan: LaunchPlan, tensors: list[Any], numbers: tuple[Any, ...], arch: int) -> Any:
    """Specialised as a launch on torch's tensors is: every address a multiple of 16, the error's columns adjacent."""
    constants = plan.constants_by_name()
    names = plan.kernel.arg_names
    runtime = [name for name in names if name not in constants]
    signature = dict(zip(runtime, [*tensors, *map(_number_type, numbers)], strict=True))
    stride = names.index("stride_column")
    constexprs = {(names.index(name),): value for name, value in constants.items()} | {(stride,): 1}
    signature |= dict.fromkeys([*constants, "stride_column"], "constexpr")
    source = ASTSource(
        fn=plan.kernel,
        signature={name: signature[name] for name in names},
        constexprs=constexprs,
        attrs={path: [["tt.divisibility", 16]] for path in _pointers(names, signature)},
    )
    options = {"num_warps": plan.config.num_warps, "num_stages": plan.config.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _number_type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_number_type, value))
    return "fp32" if isinstance(value, float) else "i32"


def _pointers(names: list[str], signature: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    for i, name in enumerate(names):
        kind = signature[name]
        if isinstance(kind, tuple):
            yield from ((i, j) for j, each in enumerate(kind) if each.startswith("*"))
        elif kind.startswith("*"):
            yield (i,)


def describe(compiled: Any) -> dict[str, Any]:
    """Instructions, registers, stack and shared memory of the machine code; columns of tensor memory."""
    ptx = compiled.asm["ptx"]
    return {
        **_resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "tensor_memory": compiled.metadata.tmem_size or 0,
        "instructions": [name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, ptx)],
        "plain_dots": len(re.findall(r"\btt\.dot .*-> tensor<[^>]*#blocked", compiled.asm["ttgir"])),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=lambda name: int(name.removeprefix("sm_")))
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--select", default="")
    arguments = parser.parse_args()
    for case in cases(arguments.arch, arguments.first):
        if arguments.select not in case.name:
            continue
        plan, tensors, numbers = planned(case, arguments.arch)
        found = describe(compile_plan(plan, tensors, numbers, arguments.arch))
        plain = {
            "triton": triton.__version__,
            "case": case.name,
            "dtype": case.dtype,
            "warps": plan.config.num_warps,
            "programs": getattr(plan.config, "programs", 1),
            "can_use_tma": bool(plan.constants_by_name().get("TMA")),
        }
        print(json.dumps(plain | found), flush=True)


if __name__ == "__main__":
    main()
