"""Compiles the kernels for GPUs that are not here and prints, as a JSON line each, what the code looks like.

A program of its own, because it needs real kernels where the other tests need interpreted ones, and because it runs
under several versions of Triton: python compile_ahead.py sm_90 half …
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dfa_kernels.backends.triton.configs import table
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
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
U_POINTERS = {"matrix": ("*fp32",), "signs": ("*i32",), "sparse": ("*i32", "*i8")}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor", "cp.async")


def projected(dtype: torch.dtype, error_size: int, source: str, tf32: bool) -> Projected:
    stored = source in U_POINTERS
    kind = {"matrix": "gaussian", "signs": "rademacher", "sparse_seed": "sparse"}.get(source, source)
    feedback = FeedbackSpec(kind, "dense" if stored else "procedural")
    return Projected(1024, error_size, (error_size, 1), dtype, feedback, source, dtype, tf32)


def grouped(how: Projected, rule: str, half_parameters: bool = False) -> GroupedProblem:
    """The paper's network with one activation, all gradients wanted, float32 parameters."""
    return GroupedProblem(
        how, (3072, 800, 800, 800), (800, 800, 800, how.error_size), (1, 1, 1, 1), ("tanh",) * 3, (0.0,) * 6, 0,
        0b1111, 0b1111, how.dtype if half_parameters else torch.float32, rule, (0,) * 4, (0,) * 4,
    )  # fmt: skip


def grouped_pointers(plan: LaunchPlan, problem: GroupedProblem) -> list[Any]:
    layers, hidden = len(problem.widths_in), problem.hidden
    x, parameter = POINTERS[problem.projected.dtype], POINTERS[problem.parameter_dtype]
    stored = U_POINTERS.get(problem.projected.source, (x,))
    begin = [x, stored, (x,) * layers, (x,) * hidden, (x,) * hidden]
    if plan.counters:
        begin = ["*i32", *begin, (x,) * layers]
    return begin + [(parameter,) * layers] * 6


def compile_plan(plan: LaunchPlan, pointers: list[Any], numbers: tuple[Any, ...], arch: int) -> Any:
    constants = plan.constants_by_name()
    names = plan.kernel.arg_names
    runtime = [name for name in names if name not in constants]
    types = [*pointers, *map(_number_type, numbers)]
    assert len(types) == len(runtime), (len(types), runtime)
    signature = dict(zip(runtime, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    stride = names.index("stride_column")
    signature["stride_column"] = "constexpr"
    source = ASTSource(
        fn=plan.kernel,
        signature={name: signature[name] for name in names},
        constexprs={**{(names.index(name),): value for name, value in constants.items()}, (stride,): 1},
        attrs=_aligned(names, signature),
    )
    options = {"num_warps": plan.config.num_warps, "num_stages": plan.config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _number_type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_number_type, value))
    return "fp32" if isinstance(value, float) else "i32"


def _aligned(names: list[str], signature: dict[str, Any]) -> dict[tuple[int, ...], Any]:
    """Every pointer a multiple of 16, as torch allocates them."""
    paths: list[tuple[int, ...]] = []
    for i, name in enumerate(names):
        kind = signature[name]
        if isinstance(kind, tuple):
            paths += [(i, j) for j, each in enumerate(kind) if each.startswith("*")]
        elif kind.startswith("*"):
            paths.append((i,))
    return {path: [["tt.divisibility", 16]] for path in paths}


def describe(compiled: Any) -> dict[str, Any]:
    """Instructions, registers, stack and shared memory of the machine code."""
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        **{name.lower(): value for name, value in resources.items()},
        "shared": compiled.metadata.shared,
        "instructions": [name for name in INSTRUCTIONS if name in ptx],
    }


def plans(arch: int, dtype: torch.dtype, tf32: bool, thorough: bool) -> Iterator[tuple[str, LaunchPlan, Any, Any]]:
    """(label, plan, pointers, numbers) of everything to compile."""
    target = Target(arch, MULTIPROCESSORS)
    arithmetic = projected(dtype, 10, "matrix", tf32).arithmetic
    configs = table()[arch][arithmetic]
    rules = {"store": 1, "momentum": 4, "adamw": 7}
    for i, config in enumerate(configs.one_phase):
        for rule, count in rules.items() if i == 0 or thorough else [("store", 1)]:
            problem = grouped(projected(dtype, 10, "matrix", tf32), rule)
            plan = plan_one_phase(problem, config)
            yield f"one_phase {i} {rule}", plan, grouped_pointers(plan, problem), (*plan.numbers, (0.5,) * count)
    for i, config in enumerate(configs.two_phase):
        for rule, count in rules.items() if i == 0 or thorough else [("store", 1)]:
            problem = grouped(projected(dtype, 1000, "matrix", tf32), rule)
            plan = plan_two_phase(problem, config, target)
            yield f"two_phase {i} {rule}", plan, grouped_pointers(plan, problem), (*plan.numbers, (0.5,) * count)
    taps = TapsProblem(
        projected(dtype, 1000, "matrix", tf32), (16384, 8192), (16, 32), ("relu",) * 2, (0.0,) * 4, 3, 0, 0
    )
    x = POINTERS[dtype]
    plan = plan_taps(taps, target)
    yield "project_taps", plan, [x, ("*fp32",), (x, x), (x, x), (x, x)], plan.numbers
    for source in ("gaussian", "rademacher", "sparse_seed", "signs"):
        problem = grouped(projected(dtype, 10, source, tf32), "store")
        plan = plan_one_phase(problem, configs.one_phase[0])
        yield f"one_phase {source}", plan, grouped_pointers(plan, problem), (*plan.numbers, (0.0,))


def main(archs: list[int], dtypes: list[str]) -> None:
    for arch in archs:
        for name in dtypes:
            dtype = DTYPES[name.removesuffix("-ieee")]
            for label, plan, pointers, numbers in plans(arch, dtype, name == "fp32", False):
                found = describe(compile_plan(plan, pointers, numbers, arch))
                print(json.dumps({"arch": arch, "dtype": name, "kernel": label, **found}), flush=True)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1].split(",")], sys.argv[2].split(","))
