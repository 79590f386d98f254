"""Compiles the kernels for GPUs that are not here and prints, as a JSON line each, what the machine code is like.

    python tests/compile_ahead.py sm_90                     everything
    python tests/compile_ahead.py sm_90 --extent rare       without those of two phases
    python tests/compile_ahead.py sm_90 --extent usual      without rare networks and sources of U at all
    python tests/compile_ahead.py sm_90 --extent brief      every kernel once or twice
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
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import async_products
import torch
import triton
from triton.compiler import ASTSource

from bench.predict import ahead, sass
from bench.predict.ahead import BLOCKS, DTYPES, PRODUCER, WIDTHS, Case, compiled, hadamard_source, planned, source_of
from dfa_kernels.backends.triton.configs import Configs, table
from dfa_kernels.backends.triton.plan_small import LARGEST_HELD_ERROR
from dfa_kernels.backends.triton.problem import LARGEST_FASTFOOD_ERROR
from dfa_kernels.backends.triton.transform import programs_ahead

SOURCES = ("matrix", "signs", "sparse", "gaussian", "uniform", "rademacher", "sparse_seed", *BLOCKS, "projection")
ERROR_SIZES = {"strip": 10, "two_phase": 1000, "project_taps": 1000, "deltas": 10, "grouped_gemm": 10}
HADAMARD_LENGTHS = (2, 64, 256, 1024, 8192, 16384, 32768)
# A row of one warp, and one that is loaded ahead.
USUAL_LENGTHS = (1024, 32768)
INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "cp.async": r"\bcp\.async\.c[ag]\.shared",
    "mbarrier": r"\bmbarrier\.arrive\.shared",
}
EXTENTS = ("brief", "usual", "rare", "all")
# An architecture for each kind of tensor core; another of that kind has other limits and configs.
KINDS_OF_CORE = (86, 90, 100)
# Where all sources of U and rare networks are compiled: each kind of tensor core, and both precisions.
THOROUGH = {(86, "bf16"), (90, "bf16"), (100, "fp32")}
# Where products go on while the program does, and rings of tiles come with the copy engine or without it.
ASYNCHRONOUS = (90, 100)
RARE = ("dropout_mask", "activations")
# In these dtypes the launches for wide networks differ from the others by an instruction that `two_phase` has as well.
SPARED = ("fp16", "ieee")
# Of the batch that small networks are compiled for: δ of it is one part. Of one whose offsets need 64 bits.
ROWS, MANY_ROWS = 128, 2**20


def cases(arch: int, extent: str = "all") -> Iterator[Case]:
    for dtype in DTYPES:
        configs = table()[arch]["ieee" if dtype == "ieee" else "tf32" if dtype == "fp32" else "half"]
        # float16 has bfloat16's configs, another instruction for products, and e Uᵀ from U in two parts.
        kernels = [kernel for kernel in ERROR_SIZES if is_compiled(kernel, dtype, arch, extent)]
        yield from _tables(dtype, configs, kernels, first_only=is_first_only(dtype, extent))
        if extent != "brief" and (extent == "all" or arch in KINDS_OF_CORE):
            yield from _more(arch, dtype, configs, extent == "all")
        if arch == 90 and dtype in ("fp16", "bf16"):
            yield from _loaded_by_a_warp(dtype, extent)
        if arch == 100 and dtype == "ieee":
            yield from _accumulated_apart(extent)
        if extent in ("rare", "all") and (arch, dtype) in THOROUGH:
            yield from _rare(dtype, configs, extent == "all")


def is_compiled(kernel: str, dtype: str, arch: int, extent: str) -> bool:
    """Whether configs of this kernel are compiled with plain gradients."""
    if extent == "brief":
        return dtype == "bf16" or kernel in ("strip", "two_phase")
    if kernel not in ("deltas", "grouped_gemm") or dtype not in SPARED:
        return True
    return extent == "all" and (dtype == "ieee" or arch in ASYNCHRONOUS)


def is_first_only(dtype: str, extent: str) -> bool:
    """Whether only the first config of each kernel is compiled."""
    return extent == "brief" or (extent != "all" and dtype == "fp16")


def _tables(dtype: str, configs: Configs, kernels: list[str], first_only: bool) -> Iterator[Case]:
    """Every config with plain gradients."""
    for kernel in kernels:
        for config in range(1 if first_only else len(getattr(configs, kernel))):
            rows = ROWS if kernel == "strip" else 1024
            yield Case(kernel, config, dtype, error_size=ERROR_SIZES[kernel], rows=rows)


def _more(arch: int, dtype: str, configs: Configs, everything: bool) -> Iterator[Case]:
    """Updates, several parts, both kinds of U, offsets of 64 bits."""
    one, two = Case("strip", 0, dtype, rows=ROWS), Case("two_phase", 0, dtype, error_size=1000)
    # As many rows as fit, in parts: those of plain gradients are the larger ones.
    largest = max(range(len(configs.strip)), key=lambda i: configs.strip[i].rows)
    if dtype != "fp16":
        several = replace(one, config=largest, rows=configs.strip[largest].rows)
        yield from (several, replace(several, rule="adamw"))
        yield replace(one, rule="sgd")
    if dtype == "bf16" or (dtype != "fp16" and everything):
        yield replace(one, rule="momentum")
    if dtype in ("fp32", "bf16"):
        # The output layer's error goes through a copy where its rows are no multiple of 16 bytes.
        yield replace(two, error_size=10)
        yield from (replace(case, rule="adamw", source="gaussian") for case in (one, two))
        yield from (replace(case, rule="adamw", numbers_in_memory=True) for case in (one, two))
    if arch in ASYNCHRONOUS and dtype in ("fp16", "bf16"):
        yield replace(two, config=_without_tma(configs.two_phase), network="even")
    if dtype == "fp16":
        yield replace(one, network="half")
    if dtype == "bf16":
        yield from (replace(one, rule=rule, network="half") for rule in ("store", "momentum"))
        if arch in ASYNCHRONOUS:
            yield from _wide(dtype, configs)
        else:
            yield replace(two, rows=MANY_ROWS)


def _without_tma(configs: tuple[Any, ...]) -> int:
    return next(i for i, config in enumerate(configs) if not config.needs_tma)


def _wide(dtype: str, configs: Configs) -> Iterator[Case]:
    """Rings of tiles of both ways to load them, a large epilogue, and an error that is the output layer's δ itself."""
    gemm = Case("grouped_gemm", 0, dtype)
    yield replace(gemm, config=_without_tma(configs.grouped_gemm), network="even")
    yield replace(gemm, rule="adamw", error_size=1000)
    yield Case("deltas", 0, dtype, error_size=1000)
    yield from (Case(kernel, 0, dtype, rows=MANY_ROWS) for kernel in ("deltas", "grouped_gemm"))


def _loaded_by_a_warp(dtype: str, extent: str) -> Iterator[Case]:
    case = Case(PRODUCER, 0, dtype)
    yield case
    if extent != "brief" and dtype == "bf16":
        yield from (replace(case, rule=rule) for rule in ("sgd", "momentum", "adamw"))
        yield replace(case, rule="momentum", network="half")
        yield replace(case, rule="adamw", network="deep")
        yield replace(case, rule="adamw", error_size=1000, rows=MANY_ROWS, numbers_in_memory=True)


def _accumulated_apart(extent: str) -> Iterator[Case]:
    """δ of several parts, each of whose products takes tensor memory of its own, and of two for a mask's sake."""
    case = Case("strip", 0, "ieee", rule="adamw", network="odd", rows=ROWS)
    yield case
    if extent != "brief":
        yield replace(case, network="positions", rows=ROWS // 4)
        yield replace(case, rule="momentum", network="dropout_mask")


def _rare(dtype: str, configs: Configs, everything: bool) -> Iterator[Case]:
    one, two = Case("strip", 0, dtype, rows=ROWS), Case("two_phase", 0, dtype, error_size=1000)
    taps = replace(two, kernel="project_taps")
    # Regenerated tiles have no more rows than the batch.
    small = [replace(taps, source=source, rows=8) for source in ("gaussian", "rademacher")]
    yield from (replace(taps, source=source) for source in ("gaussian", "sparse_seed", *BLOCKS, "projection"))
    yield from (replace(taps, source=source, error_size=LARGEST_FASTFOOD_ERROR) for source in BLOCKS)
    yield from small
    for case in (one, two) if everything else (one,):
        yield from (replace(case, source=source) for source in SOURCES if source not in ("matrix", "gaussian"))
        yield from (replace(case, rule=rule) for rule in ("sgd", "momentum", "adamw"))
        yield from (replace(case, rule="adamw", network=network) for network in RARE)
        yield replace(case, rule="adamw", network="positions", rows=case.rows // 4)
    yield from (replace(one, rule="adamw", network=network) for network in WIDTHS)
    if everything:
        yield from (replace(case, kernel="two_phase") for case in small)
        without_tma = replace(two, config=_without_tma(configs.two_phase))
        yield from (replace(without_tma, rule="adamw", network=network) for network in WIDTHS)
    yield replace(one, rule="adamw", error_size=LARGEST_HELD_ERROR)
    deltas = replace(two, kernel="deltas", error_size=10)
    yield from (
        replace(deltas, source=source) for source in ("gaussian", "sparse_seed", "signs", *BLOCKS, "projection")
    )
    yield from (replace(deltas, source=source, error_size=1000) for source in ("gaussian", "fastfood_seed"))
    yield from (replace(deltas, network=network) for network in RARE)
    yield from (replace(one, source=source, error_size=1000) for source in ("matrix", "gaussian", "sparse"))
    yield from (replace(one, source=source, error_size=LARGEST_HELD_ERROR) for source in ("gaussian", *BLOCKS))


def describe(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Instructions, registers, stack and shared memory of the machine code; what overwrites a tile that is read."""
    ptx = kernel.asm["ptx"]
    return {
        **sass.resources(kernel.asm["cubin"]),
        "warps": int(re.search(r"\.reqntid (\d+)", ptx)[1]) // 32,  # type: ignore[index]
        "shared": kernel.metadata.shared,
        "tensor_memory": kernel.metadata.tmem_size or 0,
        "instructions": [name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, ptx)],
        "loads": sorted(_bytes_at_once(ptx, "ld")),
        "stores": sorted(_bytes_at_once(ptx, "st")),
        "plain_dots": len(re.findall(r"\btt\.dot .*-> tensor<[^>]*#blocked", kernel.asm["ttgir"])),
        "overwritten": _overwritten(kernel.asm["ttgir"], arguments),
        "reads_ahead": _reads_ahead(kernel.asm["ttgir"]),
    }


def _overwritten(ttgir: str, arguments: dict[str, Any]) -> list[str]:
    """Where warps load and others multiply, barriers in memory keep them apart: those cannot be followed."""
    return [] if "warp_specialize" in ttgir else async_products.overwritten(ttgir, arguments)


def _reads_ahead(ttgir: str) -> bool:
    """Whether a loop reads what its next turn is the first to use."""
    read = set(re.findall(r"(%[\w.]+) = tt\.load ", ttgir))
    handed_on = [line for line in ttgir.splitlines() if "scf.yield" in line]
    return any(read.intersection(re.findall(r"%[\w.]+", line)) for line in handed_on)


def _bytes_at_once(ptx: str, way: str) -> set[int]:
    """How many a thread loads ("ld") from global memory at once, or stores ("st") there."""
    plain = re.findall(rf"\b{way}\.global(?:\.[a-z_:\d]+)*?(?:\.v(\d))?\.[bfsu](\d+) ", ptx)
    found = {int(count or 1) * int(bits) // 8 for count, bits in plain}
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global .*, (0x\w+)", ptx) if way == "ld" else []
    return found | {int(size, 16) for size in copies}


def machine_code(case: Case, arch: int, known: Path | None) -> dict[str, Any]:
    """What `describe` says of a case, or why it does not compile; and what its config promises."""
    plan = planned(case, arch)
    promised = {"multiplies": case.multiplies, "tma": plan.uses_tma, "warps": plan.config.num_warps}
    promised |= {"programs": plan.config.programs, "stages": plan.config.num_stages}
    promised["ahead"] = plan.arguments.get("PARAMETERS_AHEAD", False)
    promised["index"] = plan.arguments["INDEX"].primitive_bitwidth
    return promised | described(source_of(plan, case.numbers_in_memory), plan.options, arch, known, plan.arguments)


def hadamard(length: int, dtype: torch.dtype, arch: int, known: Path | None) -> dict[str, Any]:
    """As `machine_code`, of the transform."""
    source, options = hadamard_source(length, dtype, arch)
    programs = max(1, programs_ahead(length, dtype, arch))
    promised = {"multiplies": False, "tma": False, "warps": options["num_warps"], "programs": programs, "stages": 1}
    return promised | described(source, options, arch, known, {})


def described(
    source: ASTSource, options: dict[str, Any], arch: int, known: Path | None, arguments: dict[str, Any]
) -> dict[str, Any]:
    """What `describe` says, or why it does not compile."""
    programs = "".join(
        Path(module).read_text() for module in (__file__, ahead.__file__, sass.__file__, async_products.__file__)
    )
    numbers = {name: value for name, value in arguments.items() if not name.isupper()}
    identity = f"{triton.__version__} {arch} {sorted(options.items())} {source.hash()} {numbers} {programs}"
    file = known / f"{hashlib.sha256(identity.encode()).hexdigest()}.json" if known else None
    if file and file.exists():
        saved: dict[str, Any] = json.loads(file.read_text())
        return saved
    try:
        found = describe(compiled(source, options, arch), arguments)
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
    parser.add_argument("--extent", choices=EXTENTS, default="all")
    parser.add_argument("--select", default="")
    parser.add_argument("--known", type=Path)
    arguments = parser.parse_args()
    for case in cases(arguments.arch, arguments.extent):
        if arguments.select in case.name:
            tell(case, machine_code(case, arguments.arch, arguments.known))
    few = arguments.extent != "all"
    for length in USUAL_LENGTHS if few else HADAMARD_LENGTHS:
        for dtype in ("fp32", "bf16")[: 1 if few else None]:
            case = Case("hadamard", 0, dtype, network=f"n={length}")
            if arguments.select in case.name:
                tell(case, hadamard(length, DTYPES[dtype], arguments.arch, arguments.known))


def tell(case: Case, result: dict[str, Any]) -> None:
    about = {"triton": triton.__version__, "name": case.name, **asdict(case)}
    print(json.dumps(about | result), flush=True)


if __name__ == "__main__":
    main()
