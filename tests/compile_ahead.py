"""Compiles the kernels for GPUs that are not here and prints, as a JSON line each, what the machine code is like.

    python tests/compile_ahead.py sm_90                     everything
    python tests/compile_ahead.py sm_90 --usual             without rare networks and sources of U
    python tests/compile_ahead.py sm_90 --select two_phase  cases whose name contains this
    python tests/compile_ahead.py sm_90 --known FOLDER      what an earlier call left there is not compiled again

A program of its own, because it needs real kernels where the other tests need interpreted ones, and because it runs
under several versions of Triton.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dfa_kernels.backends.triton.configs import Configs, table
from dfa_kernels.backends.triton.epilogue import NUMBERS
from dfa_kernels.backends.triton.hadamard import hadamard_kernel, tile_of
from dfa_kernels.backends.triton.plan import (
    LARGEST_HELD_ERROR,
    LaunchPlan,
    plan_one_phase,
    plan_projection,
    plan_two_phase,
)
from dfa_kernels.backends.triton.problem import (
    LARGEST_FASTFOOD_ERROR,
    GroupedProblem,
    Projected,
    TapsProblem,
    Target,
)
from dfa_kernels.feedback_spec import FeedbackSpec

MULTIPROCESSORS = 100
DTYPES = {"fp32": torch.float32, "ieee": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
STORED = {
    "matrix": ("*fp32",), "signs": ("*i32",), "sparse": ("*i32", "*i8"), "projection": ("*fp32",),
    "fastfood": ("*i8", "*i32", "*fp32", "*fp32"),
}  # fmt: skip
KINDS = {
    "matrix": "gaussian", "signs": "rademacher", "sparse_seed": "sparse", "fastfood_seed": "fastfood",
    "projection": "fastfood",
}  # fmt: skip
BLOCKS = ("fastfood", "fastfood_seed")
SOURCES = ("matrix", "signs", "sparse", "gaussian", "uniform", "rademacher", "sparse_seed", *BLOCKS, "projection")
HADAMARD_LENGTHS = (2, 64, 1024, 8192, 32768)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "cp.async": r"\bcp\.async\.c[ag]\.shared",
}
# Where all sources of U and rare networks are compiled: each kind of tensor core, and both precisions.
THOROUGH = {(86, "bf16"), (90, "bf16"), (100, "fp32")}
RARE = ("noise", "positions", "activations")
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

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.config} {self.dtype} {self.rule} {self.source} E={self.error_size} {self.network}"

    @property
    def multiplies(self) -> bool:
        """Whether there is a matrix product in it: a sparse U is summed up, a given P only read."""
        return self.kernel != "project_taps" or self.source not in ("sparse", "sparse_seed", "projection", *BLOCKS)


def cases(arch: int, usual_only: bool = False) -> Iterator[Case]:
    for dtype in DTYPES:
        configs = table()[arch]["ieee" if dtype == "ieee" else "tf32" if dtype == "fp32" else "half"]
        # float16 has bfloat16's configs, and another product's instruction only.
        yield from _tables(dtype, configs, first_only=usual_only and dtype == "fp16")
        one, two = Case("one_phase", 0, dtype), Case("two_phase", 0, dtype, error_size=1000)
        if dtype in ("fp32", "bf16"):
            # The output layer's error goes through a copy where its rows are no multiple of 16 bytes.
            yield replace(two, error_size=10)
            yield from (replace(case, rule="adamw", source="gaussian") for case in (one, two))
        if not usual_only and (arch, dtype) in THOROUGH:
            without_tma = next(i for i, config in enumerate(configs.two_phase) if not config.needs_tma)
            yield from _rare(one, two, replace(two, config=without_tma))


def _tables(dtype: str, configs: Configs, first_only: bool) -> Iterator[Case]:
    """Every config with plain gradients."""
    for kernel, error_size in {"one_phase": 10, "two_phase": 1000, "project_taps": 1000}.items():
        for config in range(1 if first_only else len(getattr(configs, kernel))):
            yield Case(kernel, config, dtype, error_size=error_size)


def _rare(one: Case, two: Case, two_without_tma: Case) -> Iterator[Case]:
    taps = replace(two, kernel="project_taps")
    yield from (replace(taps, source=source) for source in ("gaussian", "sparse_seed", *BLOCKS, "projection"))
    yield from (replace(taps, source=source, error_size=LARGEST_FASTFOOD_ERROR) for source in BLOCKS)
    for case in (one, two):
        yield from (replace(case, source=source) for source in SOURCES if source not in ("matrix", "gaussian"))
        yield from (replace(case, rule=rule) for rule in ("sgd", "momentum", "adamw"))
        yield from (replace(case, rule="adamw", network=network) for network in RARE)
    for case in (one, two_without_tma):
        yield from (replace(case, rule="adamw", network=network) for network in WIDTHS)
    yield replace(one, rule="adamw", error_size=LARGEST_HELD_ERROR)


def projected(case: Case) -> Projected:
    feedback = FeedbackSpec(KINDS.get(case.source, case.source), "dense" if case.source in STORED else "procedural")
    dtype = torch.float32 if case.source == "projection" else DTYPES[case.dtype]
    strides = (case.error_size, 1)
    return Projected(
        1024, case.error_size, strides, dtype, feedback, case.source, DTYPES[case.dtype], True, case.dtype == "fp32"
    )


def grouped(case: Case) -> GroupedProblem:
    """The paper's network, all gradients wanted, float32 parameters."""
    width, hidden = WIDTHS.get(case.network, (3072, 800))
    activations = ("tanh", "relu", "gelu") if case.network == "activations" else ("tanh",) * 3
    return GroupedProblem(
        projected(case),
        (width, *(hidden,) * 3),
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
        plan = plan_projection(taps(case), config)
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


def source_of(plan: LaunchPlan, tensors: list[Any], numbers: tuple[Any, ...]) -> ASTSource:
    """Specialised as a launch on torch's tensors is: every address a multiple of 16, the error's columns adjacent.

    But for the numbers in tuples, which a launch specialises as well: on being 1, and on being a multiple of 16.
    """
    constants = plan.constants_by_name()
    names = plan.kernel.arg_names
    runtime = [name for name in names if name not in constants]
    signature = dict(zip(runtime, [*tensors, *map(_number_type, numbers)], strict=True))
    stride = names.index("stride_column")
    constexprs = {(names.index(name),): value for name, value in constants.items()} | {(stride,): 1}
    signature |= dict.fromkeys([*constants, "stride_column"], "constexpr")
    return ASTSource(
        fn=plan.kernel,
        signature={name: signature[name] for name in names},
        constexprs=constexprs,
        attrs={path: [["tt.divisibility", 16]] for path in _pointers(names, signature)},
    )


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


def machine_code(case: Case, arch: int, known: Path | None) -> dict[str, Any]:
    """What `describe` says of a case, or why it does not compile; and what its config promises."""
    plan, tensors, numbers = planned(case, arch)
    source, options = source_of(plan, tensors, numbers), plan.options
    promised = {"multiplies": case.multiplies, "tma": plan.uses_tma, "warps": plan.config.num_warps}
    promised |= {"programs": plan.config.programs, "stages": plan.config.num_stages}
    return promised | compiled(source, options, arch, known)


def hadamard(length: int, dtype: torch.dtype, arch: int, known: Path | None) -> dict[str, Any]:
    """As `machine_code`, of the transform."""
    names = hadamard_kernel.arg_names
    warps, rows = tile_of(length)
    constants = {"BLOCK": rows, "BITS": length.bit_length() - 1}
    types = {"x": POINTERS[dtype], "out": POINTERS[dtype], "rows": "i32", "n": "i32", "scale": "fp32"}
    source = ASTSource(
        fn=hadamard_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("x", "out", "n")[: 2 + (length >= 16)]},
    )
    promised = {"multiplies": False, "tma": False, "warps": warps, "programs": 1, "stages": 1}
    return promised | compiled(source, {"num_warps": warps, "enable_fp_fusion": True}, arch, known)


def compiled(source: ASTSource, options: dict[str, Any], arch: int, known: Path | None) -> dict[str, Any]:
    """What `describe` says, or why it does not compile."""
    identity = f"{triton.__version__} {arch} {sorted(options.items())} {source.hash()} {Path(__file__).read_text()}"
    file = known / f"{hashlib.sha256(identity.encode()).hexdigest()}.json" if known else None
    if file and file.exists():
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept
    try:
        found = describe(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))
    except Exception as error:
        return {"error": _first_cause(error)}
    if file:
        file.write_text(json.dumps(found))
    return found


def _first_cause(error: BaseException) -> str:
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", type=lambda name: int(name.removeprefix("sm_")))
    parser.add_argument("--usual", action="store_true")
    parser.add_argument("--select", default="")
    parser.add_argument("--known", type=Path)
    arguments = parser.parse_args()
    for case in cases(arguments.arch, arguments.usual):
        if arguments.select in case.name:
            tell(case, machine_code(case, arguments.arch, arguments.known))
    for length in HADAMARD_LENGTHS:
        for dtype in ("fp32", "bf16")[: 1 if arguments.usual else None]:
            case = Case("hadamard", 0, dtype, network=f"n={length}")
            if arguments.select in case.name:
                tell(case, hadamard(length, DTYPES[dtype], arguments.arch, arguments.known))


def tell(case: Case, result: dict[str, Any]) -> None:
    about = {"triton": triton.__version__, "name": case.name, **asdict(case)}
    print(json.dumps(about | result), flush=True)


if __name__ == "__main__":
    main()
