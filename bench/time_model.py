"""Predicts how long a launch takes, from its machine code and a card's datasheet. Nothing here is measured.

    time = LAUNCH + max(bytes / bandwidth, the busiest multiprocessor's time for its tiles)
    its time = max(tiles × work, tiles / programs at once, rounded up × alone)
    work = rest + turns × turn; each the largest of the times that one unit of the multiprocessor needs
    alone = LATENCY + rest + turns × max(turn, waiting)

A turn is one of the product's loop, on the path with the fewest instructions; the rest is the path with the most
instructions outside of it. Waiting is LATENCY if the loop loads into registers, or LATENCY / stages ahead if it copies
to shared memory. Bytes are the fewest that the workload can move.

The units: four schedulers that issue an instruction each a clock; float32, integer multiply-add, other integer and
logic, and special-function lanes; the pipe that float32 and integer multiply-add share; shared memory with L1 (128
bytes and one instruction a clock); what a tile asks of the L2 cache (64 bytes a clock, and its share of what the whole
cache gives); tensor cores.

What is left out makes a card slower than this: instructions that wait for each other and for barriers, bank conflicts,
misses of the L2 cache beyond the fewest bytes, clocks below the datasheet's under a limit of power, and memory that
reaches some nine tenths of its datasheet's bandwidth. Left out too, and making it faster: loads that hit in L1, or in
L2 sooner than LATENCY, and what an earlier kernel left in L2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import sass
from bench.cards import MULTIPROCESSORS, RESERVED_SHARED, Card, Multiprocessor
from bench.sass import Instruction

LAUNCH = 2.5e-6
"""Seconds from the end of one kernel of a CUDA graph to the end of an empty one behind it. An assumption."""
LATENCY = 600e-9
"""Seconds from a load to its data, from memory. An assumption, between what is published for these cards."""
SCHEDULERS = 4
LANES = 32
"""Threads of a warp."""
SHARED_BYTES = 128
"""A clock, of a multiprocessor's L1 and shared memory (NVIDIA's architecture whitepapers)."""
L2_BYTES = 64
"""A clock, that a multiprocessor takes from the L2 cache at most. An assumption, as on the A100 and before."""
SPECIAL_LANES = 16
"""CUDA Programming Guide, "Throughput of Native Arithmetic Instructions"."""
MMA_SYNC_ON_SM_90 = 0.63
"""Of the datasheet's rate: what instructions of one warp reach (Luo et al., arXiv 2402.13499)."""
UNITS = {
    "integer products": r"IMAD",
    "integer and logic": r"IADD|VIADD|LEA|LOP|SHF|PRMT|PLOP|SEL|SGXT|BMSK|ISETP|FSETP|FSEL|FSET|FMNMX|IMNMX|VIMNMX",
    "float32": r"FFMA|FMUL|FADD|FSWZ",
    "special functions": r"MUFU|I2F\b|F2I\b|FRND|F2F\b|POPC|FLO",
}
REGISTERS_AT_ONCE = 256
"""A warp's registers are handed out in such units, and its program's shared memory in SHARED_AT_ONCE bytes."""
SHARED_AT_ONCE = 128


@dataclass(frozen=True)
class Work:
    """What one warp has to run: instructions in all and by unit, bytes through shared memory, products' operations."""

    instructions: int
    units: dict[str, int]
    memory: int
    shared_bytes: float
    tensor: dict[tuple[str, bool], float]
    """By the instruction, "HMMA" or "HGMMA", and whether in tf32."""

    @staticmethod
    def of(code: Sequence[Instruction]) -> Work:
        units = {name: sum(bool(re.match(pattern, line.opcode)) for line in code) for name, pattern in UNITS.items()}
        moving = [moved for line in code if (moved := sass.shared_bytes(line))]
        tensor = {
            (kind, tf32): sum(
                sass.operations(line)
                for line in code
                if line.opcode.startswith(f"{kind}.") and ("TF32" in line.opcode) == tf32
            )
            for kind in ("HMMA", "HGMMA")
            for tf32 in (False, True)
        }
        return Work(len(code), units, len(moving), sum(max(SHARED_BYTES, moved) for moved in moving), tensor)


@dataclass(frozen=True)
class Phase:
    """What a program runs: its loop, and what is around it. Without a loop everything is `rest`."""

    rest: Work
    turn: Work | None = None
    operations: float = 0.0
    """Of the products in a turn, by a warp."""
    loads: dict[str, int] = field(default_factory=dict)
    """Instructions in the loop that read global memory, by kind."""
    products: int = 0
    """Instructions in the loop that multiply."""
    most: int = 0
    """Instructions of the longest turn."""


@dataclass(frozen=True)
class Kernel:
    """What the machine code says. Bytes; registers of a thread."""

    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    stages: int
    phase: Phase

    @property
    def spills(self) -> bool:
        """Whether anything lies on the stack or in local memory that belongs into registers."""
        return self.stack > 0 or self.local > 0


@dataclass(frozen=True)
class Tiles:
    """How many a launch has, and of each: steps of its loop, operations of a step, bytes asked of the L2 cache."""

    count: int
    steps: int = 0
    step_operations: float = 0.0
    step_bytes: float = 0.0
    other_bytes: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Seconds; `limit`: what takes most of them."""

    seconds: float
    limit: str


def kernel_of(compiled: Any, warps: int, stages: int) -> Kernel:
    """Triton's compiled kernel, read."""
    cubin = compiled.asm["cubin"]
    used = sass.resources(cubin)
    phase = phase_of(sass.instructions(sass.disassembled(cubin)))
    return Kernel(used["reg"], used["stack"], used["local"], compiled.metadata.shared, warps, stages, phase)


def phase_of(code: Sequence[Instruction]) -> Phase:
    """The loop that multiplies, if there is one, and the rest."""
    start, ends = code[0].address, {line.address for line in code if line.opcode == "EXIT"}
    bodies = sass.product_loops(code)
    if not bodies:
        return Phase(Work.of(sass.path(code, start, ends, longest=True)))
    (body,) = bodies
    first, last = body[0].address, body[-1].address
    before = sass.path(code, start, {first}, longest=True)
    after = sass.path(code, first, {end for end in ends if end > last}, longest=True)
    rest = [line for line in (*before, *after) if not first <= line.address <= last]
    turn = sass.path(code, first, {last})
    most = sass.path(code, first, {last}, longest=True)
    products = sum(sass.operations(line) > 0 for line in turn)
    loads = dict(sorted(sass.loads(turn).items()))
    return Phase(Work.of(rest), Work.of(turn), sum(map(sass.operations, turn)), loads, products, len(most))


def programs_at_once(kernel: Kernel, arch: int) -> int:
    """How many programs of it a multiprocessor takes; 0 if not even one."""
    has: Multiprocessor = MULTIPROCESSORS[arch]
    registers = _up(kernel.registers * LANES, REGISTERS_AT_ONCE) * kernel.warps
    shared = _up(kernel.shared + RESERVED_SHARED, SHARED_AT_ONCE)
    if kernel.shared > has.shared_of_program:
        return 0
    return min(has.programs, has.warps // kernel.warps, has.registers // registers, has.shared // shared)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(kernel: Kernel, arch: int) -> float:
    """Share of a multiprocessor's warps that run at once."""
    return programs_at_once(kernel, arch) * kernel.warps / MULTIPROCESSORS[arch].warps


def clocks(work: Work, warps: int, card: Card, l2_bytes: float = 0.0) -> dict[str, float]:
    """Clocks that each unit of a multiprocessor needs for a program's work."""
    has = MULTIPROCESSORS[card.arch]
    lanes = {
        "integer products": has.integer_lanes,
        "integer and logic": has.integer_lanes,
        "float32": has.float_lanes,
        "special functions": SPECIAL_LANES,
    }
    tensor_seconds = sum(
        operations
        / (card.tf32 if tf32 else card.half)
        / (MMA_SYNC_ON_SM_90 if (kind, card.arch) == ("HMMA", 90) else 1)
        for (kind, tf32), operations in work.tensor.items()
    )
    return {
        "issue": work.instructions * warps / SCHEDULERS,
        "multiply-add": (work.units["integer products"] + work.units["float32"]) * warps * LANES / has.float_lanes,
        **{name: work.units[name] * warps * LANES / lanes[name] for name in UNITS},
        "shared memory": work.shared_bytes * warps / SHARED_BYTES,
        "L2 cache": l2_bytes / min(L2_BYTES, card.l2_bytes / card.multiprocessors),
        "tensor cores": tensor_seconds * warps * card.multiprocessors * card.clock,
    }


def predict(kernel: Kernel, tiles: Tiles, bytes_moved: float, card: Card) -> Prediction:
    """The time of a launch."""
    phase, here = kernel.phase, -(-tiles.count // card.multiprocessors)
    turns, rest, turn = _clocks_of_tile(phase, tiles, kernel, card)
    work = here * (_seconds(rest, card) + turns * _seconds(turn, card))
    alone = LATENCY + _seconds(rest, card) + turns * max(_seconds(turn, card), waiting(phase, kernel.stages))
    waits = -(-here // max(1, programs_at_once(kernel, card.arch))) * alone
    memory = bytes_moved / card.bandwidth
    times = {name: here * (needed + turns * turn.get(name, 0.0)) / card.clock for name, needed in rest.items()}
    times |= {"launch": LAUNCH, "latency": max(0.0, waits - work), "memory": memory}
    return Prediction(LAUNCH + max(work, waits, memory), max(times, key=lambda name: times[name]))


def waiting(phase: Phase, stages: int) -> float:
    """Seconds at least between two turns of a loop, for what it loads."""
    if any(kind.startswith("LDG") for kind in phase.loads):
        return LATENCY
    return LATENCY / max(1, stages - 1) if phase.loads else 0.0


def _clocks_of_tile(
    phase: Phase, tiles: Tiles, kernel: Kernel, card: Card
) -> tuple[float, dict[str, float], dict[str, float]]:
    """(turns of a tile, clocks of the rest by unit, clocks of a turn by unit)."""
    rest = clocks(phase.rest, kernel.warps, card, tiles.other_bytes)
    if phase.turn is None:
        return 0.0, rest, {}
    steps = steps_of_turn(phase, tiles, kernel.warps)
    return tiles.steps / steps, rest, clocks(phase.turn, kernel.warps, card, tiles.step_bytes * steps)


def _seconds(clocks_by_unit: dict[str, float], card: Card) -> float:
    return max(clocks_by_unit.values(), default=0.0) / card.clock


def steps_of_turn(phase: Phase, tiles: Tiles, warps: int) -> int:
    """How many steps of the kernel's loop one turn of the machine code's makes."""
    return max(1, round(phase.operations * warps / tiles.step_operations)) if tiles.step_operations else 1
