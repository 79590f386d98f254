"""compute-sanitizer on a tiny network: memory accesses out of bounds (memcheck), races in shared memory (racecheck)."""

from __future__ import annotations

import glob
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu import results
from bench.gpu.steps import ROOT, environment, python

TOOLS = ("memcheck", "racecheck")
FOUND_SOMETHING = 99
PLACES = ("/usr/local/cuda*/bin/compute-sanitizer", "/usr/local/cuda*/compute-sanitizer/compute-sanitizer")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (.*)")


def main(argv: list[str] | None = None) -> int:
    parser = results.step_parser(__doc__ or "")
    parser.add_argument("--tool", help="the path of compute-sanitizer, if it is not where it usually is")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + options.limit - 2
    tool = options.tool or find_tool()
    if tool is None:
        results.write(options.json, {"tool": None})
        print("compute-sanitizer was not found, neither on the path nor in", *PLACES)
        return 0
    # Without the tool first: a broken script is no finding, and the tool need not watch the compiler.
    plain = subprocess.run(_script(), cwd=ROOT, env=_environment(), timeout=max(1.0, options.limit / 2))
    if plain.returncode != 0:
        results.write(options.json, {"tool": tool, "plain": plain.returncode})
        print(f"the script fails by itself, with exit code {plain.returncode}")
        return 1
    found = run_tools(tool, deadline)
    results.write(options.json, {"tool": tool, "plain": 0, **found})
    return 0 if all(row["clean"] for row in found.values()) else 1


def find_tool() -> str | None:
    """The newest that there is."""
    there = [path for place in PLACES for path in glob.glob(place)]
    return shutil.which("compute-sanitizer") or max(there, default=None)


def run_tools(tool: str, deadline: float) -> dict[str, dict[str, Any]]:
    """All at once: each takes a core and little of the device."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: Path(folder) / name for name in TOOLS}
        processes = {}
        for name, output in outputs.items():
            command = [tool, "--tool", name, "--error-exitcode", str(FOUND_SOMETHING), *_script()]
            with output.open("wb") as file:
                processes[name] = subprocess.Popen(
                    command, cwd=ROOT, env=_environment(), stdout=file, stderr=subprocess.STDOUT
                )
        return {name: _finish(name, processes[name], outputs[name], deadline) for name in TOOLS}


def _finish(name: str, process: subprocess.Popen[bytes], output: Path, deadline: float) -> dict[str, Any]:
    try:
        code: int | None = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = None
    text = output.read_text(errors="replace")
    print(f"--- {name}, {'ended at its limit' if code is None else f'exit code {code}'}\n{text.strip()}", flush=True)
    return verdict(code, text)


def verdict(code: int | None, text: str) -> dict[str, Any]:
    """Clean only if the tool said so: without its summary it saw nothing."""
    said = SUMMARY.findall(text)
    clean = code == 0 and bool(said) and bool(re.match(r"0 (errors|hazards)", said[-1]))
    return {"clean": clean, "exit_code": code, "summary": said[-1] if said else None}


def _script() -> Sequence[str]:
    return python("bench.gpu.small")


def _environment() -> dict[str, str]:
    # One allocation for each tensor, so that an access behind its end does not fall into the next one.
    return {**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


if __name__ == "__main__":
    sys.exit(main())
