"""What an entry of U costs when it is made anew: instructions in the machine code, counted without a GPU.

    python -m bench.predict.rng_cost [sm_90]

Compiles the projection's kernel for every source of U and counts instructions in the loop over the error's
components, a tile of U each turn. The cost of an entry is what the loop has more of than the one that loads U.
"""

from __future__ import annotations

import sys
from collections import Counter

from bench.predict.ahead import Case, compiled, planned, source_of
from bench.predict.sass import CLASSES, class_of, disassembled, instructions, loops

SOURCES = ("gaussian", "uniform", "rademacher", "signs")


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
    plan = planned(Case("project_taps", 0, "bf16", source=source, error_size=1000), arch)
    kernel = compiled(source_of(plan), plan.options, arch)
    tile = plan.arguments["BLOCK_U"] * plan.arguments["BLOCK_E"]
    body = max(loops(instructions(disassembled(kernel.asm["cubin"]))), key=len)
    return Counter(class_of(line.opcode) for line in body), tile // (32 * plan.config.num_warps)


if __name__ == "__main__":
    main(int((sys.argv[1] if len(sys.argv) > 1 else "sm_90").removeprefix("sm_")))
