"""What feedback costs in memory (Table 1 of the paper, extended): every kind and storage, for five large networks.

    python -m bench.cpu.feedback_memory [--out bench/results/cpu]

Computed bytes follow from the taps that one pass on the meta device finds. Measured bytes are real: what a fresh
process keeps and by how much its resident memory (on a GPU: torch's allocations) grows, for forms up to --limit-gb.
Writes memory.csv, memory.json and memory.png.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import sys
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import dfa_kernels as dfa
from bench import environment
from bench.cpu.large_networks import LARGE_NETWORKS, LargeNetwork
from dfa_kernels.feedback.spec import KINDS, STORAGES

TABLE_COLUMNS = ("naive", "unified", "rademacher", "sparse", "fastfood", "procedural")
# What resident memory may differ by: pages that are not full, and what Python itself takes meanwhile.
SLACK_BYTES, SLACK = 4 * 2**20, 0.01


@dataclass(frozen=True)
class Counted:
    """A network's taps, as one pass on the meta device finds them, and what their feedback would take."""

    network: str
    parameters: int
    error_size: int
    sizes: list[int]
    memory: dict[str, int]


@dataclass
class Row:
    """One line of the CSV; measured bytes are None where the form exceeds the limit."""

    network: str
    form: str
    storage: str
    layers: int
    largest_layer: int
    error_size: int
    computed_bytes: int
    measured_tensor_bytes: int | None = None
    measured_growth_bytes: int | None = None


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    counted = [count(network) for network in LARGE_NETWORKS]
    rows = [row for network in counted for row in forms(network)]
    for row in rows:
        if row.computed_bytes <= options.limit_gb * 1e9:
            measure_row(row, next(c.sizes for c in counted if c.network == row.network), options.device)
        print(line(row), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, options.out / "memory.csv")
    write_json(rows, counted, options, options.out / "memory.json")
    draw(counted, options.out / "memory.png")
    wrong = [row for row in rows if not agrees(row)]
    for row in wrong:
        print(f"computed and measured differ: {line(row)}", file=sys.stderr)
    return 1 if wrong else 0


def count(network: LargeNetwork) -> Counted:
    """The taps of the default policy and the bytes of every form of feedback; nothing is allocated."""
    net, x = network.on_meta()
    model = dfa.DFA(net, dfa.Feedback(storage="procedural"))
    model(x)
    parameters = sum(p.numel() for p in net.parameters())
    memory = dfa.feedback_memory(model, network.error_size)
    return Counted(network.name, parameters, network.error_size, [tap.size for tap in model.taps], memory)


def forms(counted: Counted) -> list[Row]:
    """The naive form, and one matrix for all layers in every kind and storage."""
    largest = max(counted.sizes)
    shape = len(counted.sizes), largest, counted.error_size
    rows = [Row(counted.network, "naive gaussian", "dense", *shape, counted.memory["naive"])]
    for kind in KINDS:
        for storage in STORAGES:
            needed = dfa.Feedback(kind, storage).nbytes(largest, counted.error_size)
            rows.append(Row(counted.network, kind, storage, *shape, needed))
    return rows


def measure_row(row: Row, sizes: list[int], device: str) -> None:
    """Makes the feedback in a process of its own."""
    naive = row.form.startswith("naive")
    kind, layers = row.form.removeprefix("naive "), sizes if naive else [max(sizes)]
    with get_context("spawn").Pool(1) as process:
        arguments = (kind, row.storage, layers, row.error_size, device)
        row.measured_tensor_bytes, row.measured_growth_bytes = process.apply(allocate, arguments)


def allocate(kind: str, storage: str, sizes: list[int], error_size: int, device: str) -> tuple[int, int]:
    """(bytes of the storages behind the kept tensors, growth of the memory in use), for a matrix per size."""
    # What the first call of any kind loads and leaves behind is not the feedback's.
    dfa.Feedback(kind, storage, seed=99).stored(min(1000, sizes[0]), error_size, device)
    before = memory_in_use(device)
    kept = [dfa.Feedback(kind, storage, seed=i).stored(size, error_size, device) for i, size in enumerate(sizes)]
    growth = memory_in_use(device) - before
    return sum(part.untyped_storage().nbytes() for parts in kept for part in parts), growth


def memory_in_use(device: str) -> int:
    """Bytes: torch's allocations on a GPU, else the resident set of this process (Linux with the GNU C library)."""
    gc.collect()
    if device == "cuda":
        return int(torch.cuda.memory_stats()["allocated_bytes.all.current"])
    # Freed temporaries would count as long as the allocator holds them back.
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) * 1024


def agrees(row: Row) -> bool:
    """Whether what was measured is what was computed; true of forms that were not measured."""
    if row.measured_tensor_bytes is None or row.measured_growth_bytes is None:
        return True
    slack = SLACK_BYTES + SLACK * row.computed_bytes
    return (
        row.measured_tensor_bytes == row.computed_bytes and abs(row.measured_growth_bytes - row.computed_bytes) <= slack
    )


def line(row: Row) -> str:
    """The row for a reader."""
    measured = "not measured (larger than the limit)"
    if row.measured_growth_bytes is not None:
        measured = f"measured: tensors {row.measured_tensor_bytes}, growth {row.measured_growth_bytes}"
    return f"{row.network:<12}{row.form:<16}{row.storage:<12}computed {row.computed_bytes:>12}, {measured}"


def write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_json(rows: list[Row], counted: list[Counted], options: argparse.Namespace, path: Path) -> None:
    growth = "allocated_bytes of torch.cuda.memory_stats" if options.device == "cuda" else "VmRSS of a fresh process"
    result = {
        "environment": environment.describe(),
        "columns": {
            "computed_bytes": "counted from the taps on the meta device, nothing allocated",
            "measured_tensor_bytes": "storages behind the tensors kept",
            "measured_growth_bytes": f"growth of {growth}",
        },
        "limit_bytes": int(options.limit_gb * 1e9),
        "networks": [asdict(network) for network in counted],
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def markdown(result: dict[str, Any]) -> str:
    """The table of memory.json: one line a network, one column a form; GB or MB."""
    counted = [Counted(**network) for network in result["networks"]]
    lines = [
        "| network (parameters) | taps, largest × error | " + " | ".join(TABLE_COLUMNS) + " |",
        "|---" * (2 + len(TABLE_COLUMNS)) + "|",
    ]
    for network in counted:
        largest = f"{len(network.sizes)}, {max(network.sizes):,} × {network.error_size:,}"
        cells = [size_text(network.memory[column]) for column in TABLE_COLUMNS]
        lines.append(f"| {network.network} ({network.parameters / 1e6:.1f} M) | {largest} | {' | '.join(cells)} |")
    return "\n".join(lines)


def size_text(count: int) -> str:
    """Bytes, for people."""
    if count == 0:
        return "0"
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def draw(counted: list[Counted], path: Path) -> None:
    """Bars by network and form, bytes on a logarithmic axis; procedural feedback has no bar."""
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    shown = [column for column in TABLE_COLUMNS if column != "procedural"]
    width = 0.8 / len(shown)
    for i, column in enumerate(shown):
        places = [n + (i - (len(shown) - 1) / 2) * width for n in range(len(counted))]
        axes.bar(places, [network.memory[column] for network in counted], width, label=column)
    ticks = [10**power for power in range(5, 12)]
    axes.set_yscale("log")
    axes.set_yticks(ticks, [size_text(tick).replace(".00", "").replace(".0", "") for tick in ticks])
    axes.set_xticks(range(len(counted)), [network.network for network in counted])
    axes.set_ylabel("kept between steps (computed)")
    axes.set_title("Memory of feedback, float32; procedural feedback keeps nothing")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, format="png")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.feedback_memory",
        description="Memory of feedback: computed for large networks, measured if it fits.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), help="folder, default %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where feedback is made for measuring")
    parser.add_argument(
        "--limit-gb", type=float, default=2.0, help="measure forms up to this size, default %(default)s"
    )
    options = parser.parse_args(argv)
    if not options.limit_gb >= 0:
        parser.error(f"--limit-gb: got {options.limit_gb}, expected at least 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
