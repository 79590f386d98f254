"""Reads machine code: what a kernel takes of a multiprocessor, its instructions, its loops, and what they load.

SASS is not documented by NVIDIA beyond the names of its instructions (CUDA Binary Utilities, "Instruction Set
Reference"); what a suffix means here is what the code that ptxas makes of known loads and products shows.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
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
FFMA_OPERATIONS = 64
# HGMMA is an instruction of four warps together; a row of either factor is this deep in whatever precision.
WARPS_OF_A_GROUP = 4
HGMMA_DEPTH_BYTES = 32


class Instruction(NamedTuple):
    """One line of SASS."""

    address: int
    opcode: str
    operands: str
    guarded: bool = False
    """Whether a predicate decides if it takes effect."""
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
    found: list[Instruction] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = found[-1].address + 16 if found else 0
        if match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line):
            found.append(Instruction(int(match[1], 16), match[3], match[4], bool(match[2])))
    return [_with_target(instruction, labels) for instruction in found]


def _with_target(instruction: Instruction, labels: dict[str, int]) -> Instruction:
    label = re.search(r"\(?(\.L_\w+)\)?", instruction.operands)
    # ptxas leaves some loops with a call that never returns.
    if not instruction.opcode.startswith(("BRA", "CALL")) or not label:
        return instruction
    return instruction._replace(target=labels.get(label[1]))


def loops(code: Iterable[Instruction]) -> Iterator[list[Instruction]]:
    """What lies between the target of each backward branch and the branch."""
    code = list(code)
    for branch in code:
        if branch.opcode.startswith("BRA") and branch.target is not None and branch.target < branch.address:
            yield [line for line in code if branch.target <= line.address <= branch.address]


def product_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that multiply matrices, in the order of their addresses; none where no loop does.

    Without tensor cores: those of which a quarter is multiply-adds.
    """
    chosen: list[list[Instruction]] = []
    for body in sorted(loops(code), key=len):
        ends = [(other[0].address, other[-1].address) for other in chosen]
        apart = all(last < body[0].address or body[-1].address < first for first, last in ends)
        if apart and (any(operations(line) > FFMA_OPERATIONS for line in body) or _mostly_ffma(body)):
            chosen.append(body)
    return sorted(chosen, key=lambda body: body[0].address)


def _mostly_ffma(body: list[Instruction]) -> bool:
    return sum(line.opcode.startswith("FFMA") for line in body) > len(body) / 4


def path(code: Sequence[Instruction], start: int, ends: Container[int], longest: bool = False) -> list[Instruction]:
    """The fewest instructions, or the most, that can run from address `start` to one of `ends`, both included.

    Without any jump backwards: of loops on the way one turn. ValueError if no path leads there.
    """
    places = {line.address: i for i, line in enumerate(code)}
    lengths, came_from = {places[start]: 1}, {}
    for place in range(places[start], len(code)):
        if place not in lengths or code[place].address in ends:
            continue
        for following in _followers(code, places, place):
            length = lengths[place] + 1
            known = lengths.get(following)
            if known is None or (length > known if longest else length < known):
                lengths[following], came_from[following] = length, place
    found = [place for place in lengths if code[place].address in ends]
    if not found:
        raise ValueError(f"ends: no path leads there from {start:#x}")
    place = (max if longest else min)(found, key=lambda each: lengths[each])
    taken = [place]
    while place in came_from:
        place = came_from[place]
        taken.append(place)
    return [code[each] for each in reversed(taken)]


def _followers(code: Sequence[Instruction], places: dict[int, int], place: int) -> Iterator[int]:
    line = code[place]
    if line.target in places and places[line.target] > place:
        yield places[line.target]
    # Newer branches carry their predicate, or the reason why they might not be taken, as an operand.
    leaves = line.opcode == "EXIT" or (line.opcode.startswith("BRA") and "," not in line.operands)
    if (line.guarded or not leaves) and place + 1 < len(code):
        yield place + 1


def operations(line: Instruction) -> float:
    """Floating-point operations that a warp adds to matrix products with it; a multiply-add is two."""
    if line.opcode.startswith("FFMA"):
        return FFMA_OPERATIONS
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", line.opcode):
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k / WARPS_OF_A_GROUP
    if shape := re.match(r"HMMA\.16(8)(\d+)\.", line.opcode):
        return 2 * 16 * 8 * int(shape[2])
    return 0


def is_tensor(line: Instruction) -> bool:
    """Whether tensor cores run it."""
    return re.match(r"HGMMA|HMMA", line.opcode) is not None


def width(opcode: str) -> int:
    """Bytes that each thread moves with a load, store or copy."""
    if wide := re.search(r"\.(128|64)\b", opcode):
        return int(wide[1]) // 8
    if narrow := re.search(r"\.[US](8|16)\b", opcode):
        return int(narrow[1]) // 8
    return 4


def loads(code: Iterable[Instruction]) -> Counter[str]:
    """Loads from global memory by kind: "TMA", "cp.async 16 B", "LDG 2 B", …; bytes are those of one thread."""
    kinds = {"UTMALDG": "TMA", "LDGSTS": "cp.async", "LDG": "LDG"}
    found: Counter[str] = Counter()
    for line in code:
        name = line.opcode.partition(".")[0]
        if name in kinds and "STRONG" not in line.opcode:
            found[kinds[name] if name == "UTMALDG" else f"{kinds[name]} {width(line.opcode)} B"] += 1
    return found


def shared_bytes(line: Instruction) -> float:
    """Bytes that a warp moves through its multiprocessor's L1 and shared memory with it."""
    name = line.opcode.partition(".")[0]
    if name == "LDSM":
        return int(line.opcode[-1]) * 128 if line.opcode[-2] == "." else 128
    if name in ("LDS", "STS", "LDG", "STG", "LDGSTS", "STSM"):
        return 32 * width(line.opcode)
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x", line.opcode):
        m, n = map(int, shape.groups())
        from_registers = re.match(r"R\d+, R\d+,", line.operands)
        return HGMMA_DEPTH_BYTES * (n if from_registers else m + n) / WARPS_OF_A_GROUP
    return 0


def class_of(opcode: str) -> str:
    """The class in CLASSES, or "other"."""
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, opcode)), "other")
