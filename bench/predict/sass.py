"""Reads machine code: what a kernel takes of a multiprocessor, its instructions and its loops.

SASS is not documented by NVIDIA beyond the names of its instructions (CUDA Binary Utilities, "Instruction Set
Reference").
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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


class Instruction(NamedTuple):
    """One line of SASS."""

    address: int
    opcode: str
    target: int | None = None
    """The address that a branch jumps to, if the listing names it."""


def resources(cubin: bytes) -> dict[str, int]:
    """Registers ("reg"), and bytes of stack ("stack") and local memory ("local"), of a thread."""
    usage = _told("cuobjdump", "--dump-resource-usage", cubin)
    return {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


def disassembled(cubin: bytes) -> str:
    """nvdisasm's listing."""
    return _told("nvdisasm", "-c", cubin)


def _told(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def instructions(listing: str) -> list[Instruction]:
    """Every instruction of nvdisasm's listing, in order."""
    labels: dict[str, int] = {}
    found: list[tuple[int, str, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = found[-1][0] + 16 if found else 0
        if match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line):
            found.append((int(match[1], 16), match[2], match[3]))
    return [Instruction(address, opcode, _target(opcode, operands, labels)) for address, opcode, operands in found]


def _target(opcode: str, operands: str, labels: dict[str, int]) -> int | None:
    label = re.search(r"\.L_\w+", operands)
    return labels.get(label[0]) if opcode.startswith("BRA") and label else None


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """What lies between the target of each backward branch and the branch."""
    for branch in code:
        if branch.target is not None and branch.target < branch.address:
            yield [line for line in code if branch.target <= line.address <= branch.address]


def class_of(opcode: str) -> str:
    """The class in CLASSES, or "other"."""
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, opcode)), "other")
