"""The projection to a million units by every form of feedback beside the plain dense product, interleaved.

    python -m bench.cpu.projection [--units 1000000] [--batch 16] [--threads 1] [--out FILE]

Before anything is timed, every result is checked at blocks of units spread over all of them against rows of U that are
written out here, multiplied in float64; it may deviate at most twice as far as the plain float32 product with those
rows does. What does not is reported as wrong, without a time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.linalg import hadamard
from torch import Tensor

import dfa_kernels as dfa
from bench import environment
from bench.cpu.interleaved import Step, interleaved, medians
from dfa_kernels.feedback import fastfood
from dfa_kernels.feedback.entries import fill, sparse_entries
from dfa_kernels.feedback.spec import FeedbackSpec

ERROR_SIZE = 1000
PRODUCT = "dense product"
# Procedural forms of the other kinds take a hundred times as long on a CPU: procedural.py.
FORMS = (
    ("gaussian", "dense"),
    ("rademacher", "dense"),
    ("sparse", "dense"),
    ("fastfood", "dense"),
    ("fastfood", "procedural"),
)
TARGET = {"fastfood, dense": 5.0}
SPOTS = 12


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = measure(options.units, options.batch, options.rounds)
    print(f"error [{options.batch}, {ERROR_SIZE}] to {options.units:,} units, {torch.get_num_threads()} threads")
    for row in rows:
        print(line(row))
    if options.out:
        result = {"environment": environment.describe(), "units": options.units, "batch": options.batch, "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["correct"] for row in rows) else 1


def measure(units: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row for the dense product and for each form."""
    error = torch.randn(batch, ERROR_SIZE, generator=torch.Generator().manual_seed(1))
    feedbacks = {f"{kind}, {storage}": dfa.Feedback(kind, storage, normalize=False) for kind, storage in FORMS}
    matrix = feedbacks["gaussian, dense"].stored(units, ERROR_SIZE, "cpu")[0]
    steps: dict[str, Step] = {PRODUCT: lambda: error @ matrix.T}
    steps |= {name: partial(feedback.project, error, units) for name, feedback in feedbacks.items()}
    deviations, allowed = {}, {}
    for name, step in steps.items():
        kind = feedbacks[name].spec.kind if name in feedbacks else "gaussian"
        deviations[name], allowed[name] = deviation(step(), error, kind)
    right = {name: step for name, step in steps.items() if deviations[name] <= allowed[name]}
    seconds = medians(interleaved(right, rounds, warm_up=1))
    return [
        {
            "name": name,
            "correct": name in right,
            "deviation": deviations[name],
            "kept_bytes": feedbacks[name].nbytes(units, ERROR_SIZE) if name in feedbacks else matrix.nbytes,
            "ms": seconds[name] * 1e3 if name in right else None,
            "speedup": seconds[PRODUCT] / seconds[name] if name in right else None,
            "target": TARGET.get(name),
        }
        for name in steps
    ]


def deviation(result: Any, error: Tensor, kind: str) -> tuple[float, float]:
    """Largest error of e Uᵀ at the spots against float64, and what it may be."""
    found = plain = 0.0
    d = fastfood.block_rows(ERROR_SIZE)
    blocks = -(-result.shape[1] // d)
    for block in torch.linspace(0, blocks - 1, SPOTS).long().unique().tolist():
        here = result[:, block * d : (block + 1) * d]
        rows = written_out(kind, block, d)[: here.shape[1]]
        exact = error.double() @ rows.double().T
        found = max(found, (here - exact).abs().max().item())
        plain = max(plain, (error @ rows.float().T - exact).abs().max().item())
    return found, 2 * plain + 1e-6


def written_out(kind: str, block: int, d: int, error_size: int = ERROR_SIZE) -> Tensor:
    """Rows block·d to (block + 1)·d of U with seed 0: [d, error_size].

    Those of Fastfood are its factors multiplied as matrices in float64.
    """
    rows, cpu = range(block * d, (block + 1) * d), torch.device("cpu")
    if kind == "fastfood":
        parts = fastfood.fastfood_diagonals(0, range(block, block + 1), error_size, cpu)
        signs, permutation, gaussian, scaling = (part[0] for part in parts)
        H = torch.from_numpy(hadamard(d)).double()
        V = scaling.double()[:, None] * (H @ (gaussian.double()[:, None] * (H * signs.double())[permutation.long()]))
        return V[:, :error_size]
    if kind == "sparse":
        nonzeros = FeedbackSpec("sparse").nonzeros_per_row(error_size)
        columns, signs = sparse_entries(0, rows, error_size, nonzeros, cpu)
        values = signs * math.sqrt(error_size / nonzeros)
        return torch.zeros(d, error_size).scatter_(1, columns.long(), values)
    return fill(torch.empty(d, error_size), kind, seed=0, row=rows.start)


def line(row: dict[str, Any]) -> str:
    """A row for a reader."""
    if not row["correct"]:
        return f"{row['name']:<22}  wrong result (off by {row['deviation']:.2g}): not timed"
    target = f", target {row['target']:g}" if row["target"] else ""
    return (
        f"{row['name']:<22}{row['ms']:>9.1f} ms{row['speedup']:>8.2f} times as fast as the product{target}; "
        f"{row['kept_bytes'] / 1e6:.1f} MB kept"
    )


def markdown(result: dict[str, Any]) -> str:
    """The table of projection.json."""
    lines = ["| form | kept | ms | the product's time over it |", "|---|---|---|---|"]
    for row in result["rows"]:
        speed = f"{row['ms']:.0f} | {row['speedup']:.1f}" if row["correct"] else "wrong result: not timed |"
        lines.append(f"| {row['name']} | {row['kept_bytes'] / 1e6:.0f} MB | {speed} |")
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.projection", description="The projection by every form of feedback, interleaved."
    )
    parser.add_argument("--units", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each form (default 7)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    for name, least in (("units", 1), ("batch", 1), ("rounds", 1), ("threads", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least {least}")
    return options


if __name__ == "__main__":
    sys.exit(main())
