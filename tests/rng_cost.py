"""What an entry of U costs when it is made anew: instructions in the machine code, counted without a GPU.

    python tests/rng_cost.py [sm_90]

Compiles the projection's kernel for every source of U and counts instructions in the loop over the error's
components, a tile of U each turn. The cost of an entry is what the loop has more of than the one that loads U.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import triton
from compile_ahead import Case, planned, source_of
from triton.backends.compiler import GPUTarget

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
SOURCES = ("gaussian", "uniform", "rademacher", "signs")
CLASSES = {
    "32 x 32-bit products": r"IMAD\.WIDE\.U32|IMAD\.HI\.U32",
    "other integer products and sums": r"IMAD|IADD|LEA|VIADD",
    "logic and shifts": r"LOP3|SHF|PRMT|PLOP3|SGXT|BMSK",
    "special functions": r"MUFU",
    "conversions": r"I2F|F2I|I2FP|F2F|FRND",
    "float products and sums": r"FFMA|FMUL|FADD",
    "compare and select": r"FSEL|SEL|FSETP|ISETP|FSET|FMNMX",
    "tensor core": r"HGMMA|HMMA|WARPGROUP",
    "memory and waiting": r"LD|ST|CP|DEPBAR|BAR|SYNCS|UTMA|MEMBAR|FENCE|WARPSYNC|R2UR|S2R",
}


def main(arch: int) -> None:
    base, _ = loop_of("matrix", arch)
    for source in SOURCES:
        counts, entries = loop_of(source, arch)
        print(f"{source}: instructions an entry, {entries} entries a thread and turn")
        for name in (*CLASSES, "other"):
            print(f"  {name:<34}{(counts[name] - base[name]) / entries:>8.2f}")
        print(f"  {'all':<34}{(counts.total() - base.total()) / entries:>8.2f}")


def loop_of(source: str, arch: int) -> tuple[Counter[str], int]:
    """Instructions by class in the largest loop, and how many entries of U a thread makes in a turn of it."""
    plan, tensors, numbers = planned(Case("project_taps", 0, "bf16", source=source, error_size=1000), arch)
    compiled = triton.compile(
        source_of(plan, tensors, numbers), target=GPUTarget("cuda", arch, 32), options=plan.options
    )
    constants = plan.constants_by_name()
    tile = constants["BLOCK_U"] * constants["BLOCK_E"]
    lines = list(instructions(compiled.asm["cubin"]))
    body = max(loops(lines), key=len)
    return Counter(class_of(opcode) for _, opcode, _ in body), tile // (32 * plan.config.num_warps)


def instructions(cubin: bytes) -> Iterator[tuple[int, str, str]]:
    """(address, opcode, operands) of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    found: list[tuple[int, str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = found[-1][0] + 16 if found else 0
        if match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line):
            found.append((int(match[1], 16), match[2], match[3]))
    for address, opcode, operands in found:
        target = re.search(r"\(?(\.L_\w+)\)?", operands)
        yield address, opcode, str(labels.get(target[1], "")) if opcode.startswith("BRA") and target else operands


def loops(lines: list[tuple[int, str, str]]) -> Iterator[list[tuple[int, str, str]]]:
    """What lies between the target of each backward branch and the branch."""
    for address, opcode, target in lines:
        if opcode.startswith("BRA") and target.isdigit() and int(target) < address:
            yield [line for line in lines if int(target) <= line[0] <= address]


def class_of(opcode: str) -> str:
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, opcode)), "other")


if __name__ == "__main__":
    main(int((sys.argv[1] if len(sys.argv) > 1 else "sm_90").removeprefix("sm_")))
