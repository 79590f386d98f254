"""compute-sanitizer on the kernels of sanitizer_checks.py: accesses out of bounds (memcheck), races in shared memory
(racecheck), wrong use of barriers (synccheck).

Each check runs by itself first, all at once: that compiles its kernel, and tells a broken check from a finding. What
ran then runs under every tool, compiled.
"""

from __future__ import annotations

import glob
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.processes import ROOT, environment, finish, python, read, step_parser, write
from bench.gpu.sanitizer_checks import CHECKS, checks_here

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND_SOMETHING = 99
# torch's kernels. Ours are not named instead: a name that fits none would leave nothing checked, and all clean.
EXCLUDED = "kns=_ZN2at"
PLACES = ("/usr/local/cuda*/bin/compute-sanitizer", "/usr/local/cuda*/compute-sanitizer/compute-sanitizer")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")
PLAIN_SHARE = 0.6
"""Of the time, at most, for the runs without a tool."""
SPARE = 4.0
"""Seconds for beginning and ending."""


@dataclass(frozen=True)
class Ended:
    """What a run of sanitizer_checks.py came to."""

    code: int | None
    """None if it was ended at its limit."""
    text: str
    rows: dict[str, Any]
    """Of the checks it got through."""


def main(argv: list[str] | None = None) -> int:
    parser = step_parser(__doc__ or "")
    parser.add_argument("--tool", help="the path of compute-sanitizer, if it is not where it usually is")
    options = parser.parse_args(argv)
    begin = time.monotonic()
    deadline = begin + options.limit - SPARE
    tool = options.tool or find_tool()
    if tool is None:
        write(options.json, {"tool": None})
        print("compute-sanitizer was not found, neither on the path nor in", *PLACES)
        return 0
    checks = run_plainly([check.name for check in checks_here(CHECKS)], begin + PLAIN_SHARE * (deadline - begin))
    found: dict[str, Any] = {"tool": tool, "checks": checks}
    print(f"run without a tool in {time.monotonic() - begin:.0f} s", flush=True)
    write(options.json, found)
    ready = [name for name, row in checks.items() if row["exit_code"] == 0]
    tools = run_tools(tool, ready, deadline) if ready else {}
    write(options.json, found | tools)
    right = all(row.get("correct") for row in checks.values())
    return 0 if right and ready == list(checks) and all(row["clean"] for row in tools.values()) else 1


def find_tool() -> str | None:
    """The newest that there is."""
    there = [path for place in PLACES for path in glob.glob(place)]
    return shutil.which("compute-sanitizer") or max(there, default=None)


def run_plainly(checks: Sequence[str], deadline: float) -> dict[str, dict[str, Any]]:
    """A process for each check, since a compiler takes a core. A row for each: how it ended, and what it found."""
    ended = run_all({name: ([], [name]) for name in checks}, deadline)
    return {name: {"exit_code": run.code, **run.rows.get(name, {})} for name, run in ended.items()}


def run_tools(tool: str, checks: Sequence[str], deadline: float) -> dict[str, dict[str, Any]]:
    """All at once: each takes a core and little of the device."""
    how = ("--error-exitcode", str(FOUND_SOMETHING), "--kernel-name-exclude", EXCLUDED)
    ended = run_all({name: ([tool, "--tool", name, *how], checks) for name in TOOLS}, deadline)
    return {name: verdict(run, checks) for name, run in ended.items()}


def run_all(programs: Mapping[str, tuple[Sequence[str], Sequence[str]]], deadline: float) -> dict[str, Ended]:
    """By a name for each: what comes before the command, and the checks. Prints what they print."""
    # What a tool leaves behind that was ended may still be writing.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        folder, processes = Path(made), []
        for i, (prefix, checks) in enumerate(programs.values()):
            with (folder / f"{i}.txt").open("wb") as output:
                command = [*prefix, *_program(folder / f"{i}.json", checks)]
                processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT)
                )
        codes, ended = finish(processes, deadline), {}
        for i, (name, code) in enumerate(zip(programs, codes, strict=True)):
            text = (folder / f"{i}.txt").read_text(errors="replace")
            ended[name] = Ended(code, text, read(folder / f"{i}.json") or {})
            print(f"--- {name}, {'ended at its limit' if code is None else f'exit code {code}'}\n{text.strip()}")
    return ended


def verdict(run: Ended, checks: Sequence[str]) -> dict[str, Any]:
    """Clean only if the tool said so, and all checks ran under it: what did not run cannot be seen."""
    said = SUMMARY.findall(run.text)
    nothing = bool(said) and bool(re.match(r"0 (errors|hazards)", said[-1]))
    launched = sum((Counter(row["launched"]) for row in run.rows.values()), Counter[str]())
    return {
        "clean": run.code == 0 and nothing and set(run.rows) == set(checks),
        "exit_code": run.code,
        "summary": said[-1] if said else None,
        "launched": dict(launched),
    }


def _program(made: Path, checks: Sequence[str]) -> list[str]:
    return python("bench.gpu.sanitizer_checks", "--json", str(made), "--checks", *checks)


def _environment() -> dict[str, str]:
    # One allocation for each tensor, so that an access behind its end does not fall into the next one.
    return {**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    sys.exit(main())
