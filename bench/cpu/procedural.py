"""Projection by a matrix that is never formed: 3.2 million units, an error of 1000 components, batch 8.

    python -m bench.cpu.procedural [--units 3200000] [--out bench/results/cpu/procedural.json]

Checks spot rows of the result against the same rows of U, made by themselves, then reports time and peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import dfa_kernels as dfa
from bench import environment
from bench.cpu.projection import ERROR_SIZE, deviation

BATCH = 8
LIMIT_BYTES = 10**9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.procedural", description="Procedural projection: time, memory, correctness."
    )
    parser.add_argument("--units", type=int, default=3_200_000)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    if options.units < 1:
        parser.error(f"--units: got {options.units}, expected at least 1")
    # A process for each: the peak of resident memory never falls.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        rows = processes.starmap(measure, [(kind, options.units) for kind in ("rademacher", "gaussian")], chunksize=1)
    for row in rows:
        print(
            f"{row['kind']:<11}{row['seconds']:>8.1f} s {row['extra_bytes'] / 1e6:>8.1f} MB extra, of which the result "
            f"{row['result_bytes'] / 1e6:.1f} MB; a dense U would be {row['dense_bytes'] / 1e9:.1f} GB; "
            f"largest error {row['error']:.1e}, allowed {row['allowed_error']:.1e}"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"environment": environment.describe(), "rows": rows}, indent=1) + "\n")
    return 0 if all(row["correct"] and row["extra_bytes"] < LIMIT_BYTES for row in rows) else 1


def measure(kind: str, units: int) -> dict[str, Any]:
    """One projection to ``units`` units."""
    error = torch.randn(BATCH, ERROR_SIZE, generator=torch.Generator().manual_seed(1))
    feedback = dfa.Feedback(kind, "procedural", normalize=False)
    feedback.project(error, 1000)
    before, begin = _peak_bytes(), time.perf_counter()
    result = feedback.project(error, units)
    seconds, extra = time.perf_counter() - begin, _peak_bytes() - before
    found, allowed = deviation(result, error, kind)
    return {
        "kind": kind,
        "units": units,
        "seconds": seconds,
        "extra_bytes": extra,
        "result_bytes": result.nbytes,
        "dense_bytes": units * ERROR_SIZE * error.itemsize,
        "error": found,
        "allowed_error": allowed,
        "correct": found <= allowed,
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
