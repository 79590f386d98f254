"""Running a step: a process of its own, with a limit, and its output in a file as it comes.

Its results are a JSON file that is whole at any time, also when the step is ended in the middle.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LONGEST_LOG = 8 * 2**20
TICK = 0.5


@dataclass(frozen=True)
class Step:
    """A module that takes --json FILE and --limit SECONDS, and what it may take before it is ended."""

    name: str
    module: str
    limit: float


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    name: str
    status: str
    """"ok", "failed" or "ended at its limit"."""
    exit_code: int
    seconds: float


def run_step(
    name: str, command: Sequence[str], log: Path, limit: float, on_tick: Callable[[], None] = lambda: None
) -> Outcome:
    """Runs a command from the repository's root; whatever it started is gone afterwards. `on_tick` runs meanwhile."""
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            ended = _wait(process, begin + limit, on_tick)
        finally:
            _end_group(process)
    seconds = time.monotonic() - begin
    shorten(log, LONGEST_LOG)
    if not ended:
        return Outcome(name, "ended at its limit", 124, seconds)
    return Outcome(name, "ok" if process.returncode == 0 else "failed", process.returncode, seconds)


def _wait(process: subprocess.Popen[bytes], deadline: float, on_tick: Callable[[], None]) -> bool:
    """Whether it ended by itself."""
    while process.poll() is None:
        if time.monotonic() >= deadline:
            return False
        on_tick()
        time.sleep(min(TICK, max(0.0, deadline - time.monotonic())))
    return True


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started: they share its group, which is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """The exit codes of all once they have ended; None for each that had to be ended at the deadline."""
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    return codes


def environment() -> dict[str, str]:
    """For a process that runs from a plain checkout and whose output shall come at once."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def shorten(log: Path, longest: int) -> None:
    """Keeps the first and the last half of what is allowed."""
    size = log.stat().st_size
    if size <= longest:
        return
    with log.open("rb") as file:
        head = file.read(longest // 2)
        file.seek(size - longest // 2)
        tail = file.read()
    log.write_bytes(head + f"\n[{size - longest} bytes left out]\n".encode() + tail)


def write(path: Path, content: Any) -> None:
    """Takes the place of the file at once."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def read(path: Path) -> Any:
    """The content, or None if there is none yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def plain(value: Any) -> Any:
    """The value, with strings for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def step_parser(description: str) -> argparse.ArgumentParser:
    """The options that every step takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, required=True, help="where the results go")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds it may take")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    return parser
