"""Predicts without a GPU what the projection and the transform can reach, beside the workload's floor.

    python bench/roofline.py [--out bench/results/predicted] [--select hadamard]

Plans are those that the package makes for each card; they are compiled ahead of time and their machine code is read.
How a time follows from it, and what that leaves out, says `time_model.py`; the cards' numbers are in `cards.py`.

What an H200 took stands beside it, from `results/h200`.

The floor of a workload, computed this way in this arithmetic from memory that no cache holds yet: the larger of its
fewest bytes / bandwidth and its operations / the datasheet's rate. Writes roofline.json and roofline.md. Needs a Triton
that compiles (not TRITON_INTERPRET=1), but no driver.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dfa_kernels as dfa
from bench import environment, time_model
from bench.ahead import Case, compiled, feedback_of, hadamard_source, planned, source_of
from bench.cards import CARDS, Card
from bench.gpu.precision import tf32
from bench.time_model import Kernel, Tiles, kernel_of, occupancy, predict, programs_at_once
from dfa_kernels.backends.calls import TapsCall
from dfa_kernels.backends.triton.configs import ARITHMETICS, table
from dfa_kernels.backends.triton.hadamard import tile_of
from dfa_kernels.backends.triton.plan import LaunchPlan
from dfa_kernels.backends.triton.problem import Target
from dfa_kernels.backends.triton.taps import plan_project_taps

NOT_MEASURED = "Predicted, not measured."
# The largest tap of VGG-16 at 224 × 224.
UNITS, ERROR_SIZE, TAPS_BATCH = 64 * 224 * 224, 1000, 32
SOURCES = ("matrix", "gaussian", "rademacher", "fastfood", "fastfood_seed")
HADAMARD_NUMBERS = 2**26
LENGTHS = (64, 1024, 8192)
MEASURED, MEASURED_CARD = Path(__file__).resolve().parent / "results" / "h200", "H200"


@dataclass(frozen=True)
class Launch:
    """A kernel and the tiles it is given."""

    name: str
    kernel: Kernel
    tiles: Tiles


@dataclass(frozen=True)
class Workload:
    """What is to be done: the fewest bytes and operations, at the rate of `arithmetic`, and how it is launched."""

    name: str
    arithmetic: str
    bytes_moved: float
    operations: float
    launch: Callable[[Card], Launch]

    def floor(self, card: Card) -> float:
        """Seconds."""
        return max(self.bytes_moved / card.bandwidth, self.operations / card.rate(self.arithmetic))


def workloads() -> Iterator[Workload]:
    """In the order of the tables."""
    for source in SOURCES:
        yield projection(source)
    for length in LENGTHS:
        yield transform(length)


def projection(source: str) -> Workload:
    """δ of one tap behind a ReLU, float32 through tensor cores; operations: of the product, or of the transforms."""
    spec = feedback_of(source)
    kept = dfa.Feedback(spec.kind, spec.storage).nbytes(UNITS, ERROR_SIZE)
    bytes_moved = kept + 4 * TAPS_BATCH * (2 * UNITS + ERROR_SIZE)
    operations = 2.0 * TAPS_BATCH * UNITS * ERROR_SIZE
    if spec.kind == "fastfood":
        # Two transforms of log2(1024) sums, and three diagonals; in float32 without tensor cores.
        operations = TAPS_BATCH * UNITS * (2.0 * 10 + 3)

    def launch(card: Card) -> Launch:
        plan = taps_plan(source, card)
        return Launch(_name(plan), read(plan, card.arch), tiles_of(plan))

    name = f"project_taps {ERROR_SIZE} → {UNITS:,} b={TAPS_BATCH} tf32, {source}"
    return Workload(name, "ieee" if spec.kind == "fastfood" else "tf32", bytes_moved, operations, launch)


def taps_plan(source: str, card: Card) -> LaunchPlan:
    """What `project_taps` launches on this card."""
    spec = feedback_of(source)
    error = torch.empty(TAPS_BATCH, ERROR_SIZE, device="meta")
    kept = [torch.empty(TAPS_BATCH, 64, 224, 224, device="meta")]
    stored = dfa.Feedback(spec.kind, spec.storage).stored(UNITS, ERROR_SIZE, "meta")
    with tf32(True):
        call = TapsCall(error, stored, spec, [UNITS], kept, [None], ["relu"], [0.0, 0.0])
        return plan_project_taps(call, _target(card))


def transform(length: int) -> Workload:
    """The Walsh-Hadamard transform in float32: every number read once and written once, log2(n) sums each."""
    rows = HADAMARD_NUMBERS // length
    bits = length.bit_length() - 1

    def launch(card: Card) -> Launch:
        block = tile_of(length)[1]
        tiles = Tiles(-(-rows // block), other_bytes=8.0 * block * length)
        return Launch("hadamard", read_hadamard(length, card.arch), tiles)

    name = f"hadamard n={length} rows={rows:,} float32"
    return Workload(name, "ieee", 8.0 * HADAMARD_NUMBERS, HADAMARD_NUMBERS * (bits + 1.0), launch)


def _target(card: Card) -> Target:
    return Target(card.arch, card.multiprocessors)


def _name(plan: LaunchPlan) -> str:
    """The kernel and its tiles."""
    tiles = " × ".join(f"{name.removeprefix('block_')} {n}" for name, n in vars(plan.config).items() if "block" in name)
    return f"{plan.name.removesuffix('_kernel')}, tiles {tiles}, {plan.config.num_warps} warps"


def read(plan: LaunchPlan, arch: int) -> Kernel:
    """The plan's kernel, compiled for the architecture and read."""
    return _read_source(source_of(plan), plan.options, arch)


_read: dict[tuple[Any, ...], Kernel] = {}


def _read_source(source: Any, options: dict[str, Any], arch: int) -> Kernel:
    """What several workloads and cards launch is compiled once."""
    key = (source.hash(), tuple(sorted(options.items(), key=str)), arch)
    if key not in _read:
        _read[key] = kernel_of(compiled(source, options, arch), options["num_warps"], options.get("num_stages", 1))
    return _read[key]


def read_hadamard(length: int, arch: int) -> Kernel:
    """The transform's kernel for rows of `length` numbers, compiled and read."""
    return _read_source(*hadamard_source(length, torch.float32), arch)


def tiles_of(plan: LaunchPlan) -> Tiles:
    """Tiles [units, rows] of e Uᵀ, and of each the δ of every tap."""
    problem, arguments = plan.problem, plan.arguments
    how = problem.projected
    units, rows, depth = arguments["BLOCK_U"], arguments["BLOCK_R"], arguments["BLOCK_E"]
    error = how.error_dtype.itemsize
    other = how.dtype.itemsize * units * rows * (len(problem.sizes) + bin(problem.kept).count("1"))
    if how.is_fastfood:
        read = rows * how.error_size * error + units * _stored_bytes(how)
        return Tiles(plan.programs, other_bytes=other + read)
    return Tiles(
        plan.programs,
        -(-how.error_size // depth),
        2.0 * units * rows * depth,
        depth * (error * rows + _stored_bytes(how) * units),
        other,
    )


def _stored_bytes(how: Any) -> float:
    """Of an entry of U; of a unit for Fastfood."""
    return {"matrix": 4.0, "signs": 1 / 8, "fastfood": 13.0}.get(how.source, 0.0)


def workload_row(workload: Workload, card: Card) -> dict[str, Any]:
    """A workload on a card: what is launched, its floor, and what is predicted."""
    launch, floor = workload.launch(card), workload.floor(card)
    found = predict(launch.kernel, launch.tiles, workload.bytes_moved, card)
    return {
        "workload": workload.name,
        "card": card.name,
        "launch": launch.name,
        "floor_us": floor * 1e6,
        "predicted_us": found.seconds * 1e6,
        "fraction_of_floor": floor / found.seconds,
        "limit": found.limit,
        "tiles": launch.tiles.count,
        "spills": launch.kernel.spills,
    }


def config_cases(arch: int) -> Iterator[Case]:
    """Every committed config of the projection, on two taps."""
    dtypes = {"half": "bf16", "tf32": "fp32", "ieee": "ieee"}
    for arithmetic in ARITHMETICS:
        for config in range(len(table()[arch][arithmetic].project_taps)):
            yield Case("project_taps", config, dtypes[arithmetic], error_size=1000)


def config_rows(arch: int) -> Iterator[dict[str, Any]]:
    """A row for every config and every transform. Clocks: of a turn of its loop, if it has one."""
    card = next(card for card in CARDS if card.arch == arch)
    for case in config_cases(arch):
        plan = planned(case, arch)
        yield _row(case.kernel, case.config, case.dtype, read(plan, arch), tiles_of(plan), card)
    for length in LENGTHS:
        tiles = Tiles(1, other_bytes=8.0 * tile_of(length)[1] * length)
        yield _row("hadamard", length, "fp32", read_hadamard(length, arch), tiles, card)


def _row(name: str, config: int, dtype: str, kernel: Kernel, tiles: Tiles, card: Card) -> dict[str, Any]:
    phase = kernel.phase
    needed = time_model.clocks(phase.turn or phase.rest, kernel.warps, card, tiles.step_bytes or tiles.other_bytes)
    limit = max(needed, key=lambda unit: needed[unit])
    return {
        "arch": card.arch,
        "kernel": name,
        "config": config,
        "dtype": dtype,
        "registers": kernel.registers,
        "stack_bytes": kernel.stack,
        "spill_bytes": kernel.local,
        "shared_bytes": kernel.shared,
        "programs_per_multiprocessor": programs_at_once(kernel, card.arch),
        "occupancy": occupancy(kernel, card.arch),
        "loop_instructions": phase.turn.instructions if phase.turn else 0,
        "loop_instructions_most": phase.most,
        "loop_products": phase.products,
        "loads": phase.loads,
        "other_instructions": phase.rest.instructions,
        "tile_bytes": tiles.steps * tiles.step_bytes + tiles.other_bytes,
        "tile_operations": tiles.steps * tiles.step_operations,
        "clocks": {unit: round(value, 1) for unit, value in needed.items()},
        "limit": limit,
        "tensor_share": needed["tensor cores"] / needed[limit],
    }


def result_of(select: str) -> dict[str, Any]:
    """Everything whose name contains `select`."""
    rows = []
    for workload in workloads():
        for card in CARDS if select in workload.name else ():
            rows.append(workload_row(workload, card))
            print(line(rows[-1]), flush=True)
    archs = sorted({card.arch for card in CARDS})
    configs = [] if select else [row for arch in archs for row in config_rows(arch)]
    return {
        "note": NOT_MEASURED,
        "model": time_model.__doc__,
        "triton": triton.__version__,
        "environment": environment.describe(),
        "cards": [asdict(card) for card in CARDS],
        "workloads": rows,
        "configs": configs,
    }


def line(row: dict[str, Any]) -> str:
    """A workload on a card for a reader."""
    return (
        f"{row['workload']:<60}{row['card']:<16}floor {row['floor_us']:>10.1f} µs, "
        f"predicted {row['predicted_us']:>10.1f} µs, {row['fraction_of_floor']:>4.0%} ({row['limit']}); {row['launch']}"
    )


def markdown(result: dict[str, Any]) -> str:
    """The model, the workloads by card, and every config."""
    text = (
        f"# Roofline of the kernels\n\n**{NOT_MEASURED}** Triton {result['triton']}.\n\n```text\n{result['model']}```\n"
        "\n## Workloads\n\nMicroseconds predicted, of them the floor's share, and what takes most of the time; and "
        f"what an {MEASURED_CARD} took, and how far that is off.\n\n"
    )
    table = workload_table(result["workloads"], measured_us())
    return f"{text}{table}\n\n## Configs\n\n{config_table(result['configs'])}\n"


def measured_us() -> dict[str, float]:
    """What MEASURED_CARD took for the workloads, by name."""
    taps, transforms = (
        json.loads((MEASURED / f"{name}.json").read_text())["rows"] for name in ("projection", "hadamard")
    )
    forms = {
        row["feedback"]: row["ms"] * 1e3
        for row in taps
        if (row["function"], row["precision"]) == ("project_taps", "tf32")
    }
    specs = {source: feedback_of(source) for source in SOURCES}
    found = {projection(source).name: forms[f"{spec.kind}, {spec.storage}"] for source, spec in specs.items()}
    lengths = {row["n"]: row["ms"] * 1e3 for row in transforms if row["dtype"] == "float32"}
    return found | {transform(length).name: lengths[length] for length in LENGTHS}


def workload_table(rows: list[dict[str, Any]], measured: dict[str, float]) -> str:
    """A line a workload, a column a card, and what was measured."""
    cards = list(dict.fromkeys(row["card"] for row in rows))
    lines = [f"| workload | {' | '.join(cards)} | {MEASURED_CARD}, measured |", "|---" * (2 + len(cards)) + "|"]
    for name in dict.fromkeys(row["workload"] for row in rows):
        found = {row["card"]: row for row in rows if row["workload"] == name}
        cells = [
            f"{row['predicted_us']:,.1f}, {row['fraction_of_floor']:.0%}, {row['limit']}" for row in found.values()
        ]
        over = measured[name] / found[MEASURED_CARD]["predicted_us"]
        lines.append(f"| {name} | {' | '.join(cells)} | **{measured[name]:,.1f}** ({over:.1f}×) |")
    return "\n".join(lines)


def config_table(rows: list[dict[str, Any]]) -> str:
    """A line for every config; its numbers are those of one multiprocessor."""
    columns = (
        "arch", "kernel, config, dtype", "registers", "stack + spilled B", "shared KB", "programs, occupancy",
        "loop: instructions, products", "loads in the loop", "around the loop", "tile: KB, Mop", "limit",
        "tensor share",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        loads = ", ".join(f"{count} {kind}" for kind, count in row["loads"].items()) or "none"
        cells = (
            f"sm_{row['arch']}",
            f"{row['kernel']} {row['config']} {row['dtype']}",
            row["registers"],
            row["stack_bytes"] + row["spill_bytes"],
            f"{row['shared_bytes'] / 1024:.1f}",
            f"{row['programs_per_multiprocessor']}, {row['occupancy']:.0%}",
            f"{row['loop_instructions']}–{row['loop_instructions_most']}, {row['loop_products']}",
            loads,
            row["other_instructions"],
            f"{row['tile_bytes'] / 1024:.0f}, {row['tile_operations'] / 1e6:.1f}",
            row["limit"],
            f"{row['tensor_share']:.0%}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    result = result_of(options.select)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "roofline.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "roofline.md").write_text(markdown(result))
    spilled = {row["kernel"] for row in result["configs"] if row["stack_bytes"] + row["spill_bytes"]}
    spilled |= {f"{row['workload']} on {row['card']}" for row in result["workloads"] if row["spills"]}
    for name in sorted(spilled):
        print(f"on the stack instead of in registers: {name}", file=sys.stderr)
    return 1 if spilled else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Predicted times of the kernels beside their floor, without a GPU.")
    parser.add_argument("--out", type=Path, default=Path("runs/predicted"), help="folder, default %(default)s")
    parser.add_argument("--select", default="", help="only workloads whose name contains this, and no configs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
