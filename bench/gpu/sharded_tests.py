"""`pytest -m gpu`, in several processes: most of the time goes into compiling kernels, which needs a core each."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu import results
from bench.gpu.steps import ROOT, environment, python

MOST_PROCESSES = 8
NO_TESTS = 5
SLOWEST = 8


@dataclass
class Shard:
    """One of the processes."""

    process: subprocess.Popen[bytes]
    output: Path
    log: Path


def main(argv: list[str] | None = None) -> int:
    parser = results.step_parser(__doc__ or "")
    parser.add_argument("--tests", nargs="*", default=["tests"])
    parser.add_argument("--select", default="gpu", help="pytest's -m")
    parser.add_argument("--processes", type=int, default=0)
    options = parser.parse_args(argv)
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed here: no test was run")
        return 1
    processes = options.processes or max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) // 2))
    with tempfile.TemporaryDirectory() as folder:
        shards = [_start(i, processes, Path(folder), options.select, options.tests) for i in range(processes)]
        wait(shards, time.monotonic() + options.limit, options.json)
        found = outcomes(shards)
        _print_all(shards)
    results.write(options.json, found)
    print(f"passed {found['passed']}, failed {len(found['failed'])}, skipped {len(found['skipped'])}")
    for name in ("failed", "unfinished"):
        for test in found[name]:
            print(f"{name}: {test}")
    codes = [shard.process.returncode for shard in shards]
    return 0 if all(code in (0, NO_TESTS) for code in codes) and not found["unfinished"] else 1


def _start(index: int, parts: int, folder: Path, select: str, tests: Sequence[str]) -> Shard:
    output, log = folder / f"{index}.txt", folder / f"{index}.jsonl"
    command = python(
        "pytest", "-m", select, "-p", "bench.gpu.shard", "--shard", f"{index}/{parts}", "--shard-log", str(log),
        "-p", "no:cacheprovider", "--continue-on-collection-errors", "-o", "faulthandler_timeout=90", "--tb=short",
        *tests,
    )  # fmt: skip
    with output.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    return Shard(process, output, log)


def wait(shards: list[Shard], deadline: float, partial: Path) -> None:
    """Until all have ended, or the deadline ends them; what there is goes to `partial` meanwhile."""
    while any(shard.process.poll() is None for shard in shards) and time.monotonic() < deadline:
        results.write(partial, outcomes(shards))
        time.sleep(0.5)
    for shard in shards:
        if shard.process.poll() is None:
            shard.process.kill()
        shard.process.wait()


def outcomes(shards: list[Shard]) -> dict[str, Any]:
    """What is known of every test that has begun."""
    known: dict[str, dict[str, Any]] = {}
    for report in [report for shard in shards for report in _reports(shard.log)]:
        # A failure after the test's own success stays one.
        if known.get(report["test"], {}).get("outcome") != "failed":
            known[report["test"]] = report
    slowest = sorted(known.values(), key=lambda report: -report["seconds"])[:SLOWEST]
    by_outcome = {
        outcome: [name for name, report in known.items() if report["outcome"] == outcome]
        for outcome in ("passed", "failed", "skipped", "began")
    }
    return {
        "passed": len(by_outcome["passed"]),
        "failed": by_outcome["failed"],
        "skipped": {name: known[name]["why"] for name in by_outcome["skipped"]},
        "unfinished": by_outcome["began"],
        "slowest": {report["test"]: report["seconds"] for report in slowest},
    }


def _reports(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    # The last line may still be being written.
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _print_all(shards: list[Shard]) -> None:
    for i, shard in enumerate(shards):
        print(f"--- process {i}, exit code {shard.process.returncode}")
        print(shard.output.read_text(errors="replace").strip())


if __name__ == "__main__":
    sys.exit(main())
