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

import torch

from bench.gpu.processes import ROOT, TICK, environment, python, step_parser, write
from dfa_kernels.backends import OLDEST_FOR_TRITON

MOST_PROCESSES = 12
NO_TESTS = 5
ORDERLY = (0, 1, NO_TESTS)
"""Exit codes of pytest after it has gone through all its tests."""
TEST_LIMIT = 60
"""Seconds after which a test must be hanging."""
SLOWEST = 8


@dataclass
class Shard:
    """One of the processes, or one after the other: the next goes on behind the test that ended the one before."""

    command: list[str]
    output: Path
    log: Path
    process: subprocess.Popen[bytes]
    lines: int = 0
    """In the log when the process began."""

    def is_over(self) -> bool:
        """Ends a process that hangs in a test, and begins another if a test ended this one."""
        if self.process.poll() is None:
            if not self._hangs():
                return False
            self.process.kill()
            self.process.wait()
        begun = len(_reports(self.log))
        if self.process.returncode in ORDERLY or begun == self.lines:
            return True
        self.lines, self.process = begun, _begin(self.command, self.output)
        return False

    def _hangs(self) -> bool:
        if not self.log.exists() or time.time() - self.log.stat().st_mtime < TEST_LIMIT:
            return False
        reports = _reports(self.log)
        return len(reports) > self.lines and bool(reports[-1]["outcome"] == "began")


def main(argv: list[str] | None = None) -> int:
    parser = step_parser(__doc__ or "")
    parser.add_argument("--tests", nargs="*", default=tests_here())
    parser.add_argument("--select", default="gpu", help="pytest's -m")
    parser.add_argument("--processes", type=int, default=0)
    options = parser.parse_args(argv)
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed here: no test was run")
        return 1
    processes = options.processes or max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 2))
    with tempfile.TemporaryDirectory() as folder:
        shards = [_start(i, processes, Path(folder), options.select, options.tests) for i in range(processes)]
        wait(shards, time.monotonic() + options.limit, options.json)
        found = outcomes(shards)
        _print_all(shards)
    write(options.json, found)
    print(f"passed {found['passed']}, failed {len(found['failed'])}, skipped {len(found['skipped'])}")
    for test, why in found["failed"].items():
        print(f"failed: {test}\n{why}")
    for test in found["unfinished"]:
        print(f"began and did not end: {test}")
    codes = [shard.process.returncode for shard in shards]
    return 0 if all(code in (0, NO_TESTS) for code in codes) and not (found["failed"] or found["unfinished"]) else 1


def tests_here() -> list[str]:
    """All, or on GPUs that Triton is not used on those of the CUDA C++ kernels."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        if 10 * major + minor < OLDEST_FOR_TRITON:
            return ["tests/test_gpu_cuda.py"]
    return ["tests"]


def _start(index: int, parts: int, folder: Path, select: str, tests: Sequence[str]) -> Shard:
    output, log = folder / f"{index}.txt", folder / f"{index}.jsonl"
    command = python(
        "pytest", "-m", select, "-p", "bench.gpu.shard", f"--shard={index}/{parts}", f"--shard-log={log}",
        "-p", "no:cacheprovider", "--continue-on-collection-errors", "-o", "faulthandler_timeout=45",
        "--tb=short", *tests,
    )  # fmt: skip
    return Shard(command, output, log, _begin(command, output))


def _begin(command: list[str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("ab") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env={**environment(), "OMP_NUM_THREADS": "1"}, stdout=file, stderr=subprocess.STDOUT
        )


def wait(shards: list[Shard], deadline: float, partial: Path) -> None:
    """Until all have ended, or the deadline ends them; what there is goes to `partial` meanwhile."""
    while time.monotonic() < deadline and not all([shard.is_over() for shard in shards]):
        write(partial, outcomes(shards))
        time.sleep(TICK)
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
        "failed": {name: known[name]["why"] for name in by_outcome["failed"]},
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
