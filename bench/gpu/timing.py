"""The times: ceilings, the host's part, and every case. A process does one item after the other; if it is lost, a new
one goes on behind the item that lost it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.case_timing import build_only, make_references, measure_case
from bench.gpu.cases import CASES, QUICK, SMALL, Case, make_problem
from bench.gpu.clock import Clock
from bench.gpu.kernel_times import ceilings, first_line, floors, host_seconds
from bench.gpu.precision import tf32
from bench.gpu.processes import ROOT, TICK, environment, finish, python, read, step_parser, write
from bench.gpu.reference import complaint

CEILINGS, HOST = "ceilings", "host"
BUILD_SHARE = 0.4
ITEM_LIMIT = 90.0
"""Seconds after which an item must be hanging."""
SPARE = 4.0
"""Seconds that a process may need to end."""
LONGEST_TIMING, SHORTEST_TIMING = 8.0, 1.0


def main(argv: list[str] | None = None) -> int:
    parser = step_parser(__doc__ or "")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", help="of dfa.DFA; default auto on a GPU, torch elsewhere")
    parser.add_argument("--items", nargs="*", help="which to do; default all")
    parser.add_argument("--part", choices=("all", "measure", "build"), default="all", help="for its own processes")
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.quick:
        print("no CUDA device: nothing to time here but --quick")
        return 1
    deadline = time.monotonic() + options.limit - SPARE
    if options.part == "build":
        return build(options)
    if options.part == "measure":
        return measure(options, deadline)
    return supervise(options, deadline)


def cases_of(quick: bool) -> dict[str, Case]:
    return {case.name: case for case in (QUICK if quick else CASES)}


def items_of(options: argparse.Namespace) -> list[str]:
    """A subset for --items. The host's part comes after the ceilings, then the cases."""
    return list(options.items or [CEILINGS, HOST, *cases_of(options.quick)])


def supervise(options: argparse.Namespace, deadline: float) -> int:
    """Compiles everything first, all cases at once, then measures, alone on the device."""
    found: dict[str, Any] = {"items": {}, "unfinished": {}}
    begin = time.monotonic()
    if options.device != "cpu":
        build_all(options, begin + BUILD_SHARE * (deadline - begin))
        print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    remaining = items_of(options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        while remaining and time.monotonic() < deadline:
            current, why = run_part(options, remaining, path, deadline, found)
            remaining = [item for item in remaining if item not in found["items"] and item != current]
            if current is not None:
                found["unfinished"][current] = why
            write(options.json, found)
    for item in remaining:
        found["unfinished"][item] = "no time left"
    write(options.json, found)
    print(report(found))
    failed = [item for item, made in found["items"].items() if "reason" in made]
    return 1 if failed or found["unfinished"] else 0


def run_part(
    options: argparse.Namespace, items: Sequence[str], path: Path, deadline: float, found: dict[str, Any]
) -> tuple[str | None, str]:
    """One process over the items; what it finished goes to `found`. The item that it was lost in, and why."""
    path.unlink(missing_ok=True)
    limit = max(1.0, deadline - time.monotonic())
    process = subprocess.Popen(_command(options, "measure", path, limit, items), cwd=ROOT, env=environment())
    watched, since = None, time.monotonic()
    while process.poll() is None and time.monotonic() < min(deadline + SPARE / 2, since + ITEM_LIMIT):
        current = _merge(found, path)
        if current != watched:
            watched, since = current, time.monotonic()
        write(options.json, found)
        time.sleep(TICK)
    why = f"it did not come to an end within {time.monotonic() - since:.0f} s"
    if process.poll() is None:
        process.kill()
    elif process.returncode != 0:
        why = f"the process was lost with exit code {process.returncode}"
    process.wait()
    current = _merge(found, path)
    if current is None and process.returncode != 0 and not set(items) & set(found["items"]):
        return items[0], why
    return current, why


def _merge(found: dict[str, Any], path: Path) -> str | None:
    part = read(path) or {"items": {}, "current": None}
    found["items"] |= part["items"]
    current: str | None = part["current"]
    return current


def _command(options: argparse.Namespace, part: str, path: Path, limit: float, items: Sequence[str]) -> list[str]:
    chosen = ["--part", part, "--json", str(path), "--limit", str(limit), "--device", options.device]
    chosen += ["--quick"] if options.quick else []
    chosen += ["--backend", options.backend] if options.backend else []
    return python("bench.gpu.timing", *chosen, "--items", *items)


def build_all(options: argparse.Namespace, deadline: float) -> None:
    """A process for each case, at once; whoever is late compiles again when measured."""
    names = [item for item in items_of(options) if item in cases_of(options.quick)]
    with tempfile.TemporaryDirectory() as folder:
        nowhere = Path(folder) / "none.json"
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2"}
        processes = [
            subprocess.Popen(
                _command(options, "build", nowhere, 0.0, [name]), cwd=ROOT, env={**environment(), **threads}
            )
            for name in names
        ]
        finish(processes, deadline)


def build(options: argparse.Namespace) -> int:
    for name in options.items:
        build_only(make_problem(cases_of(options.quick)[name], _device(options), _backend(options)))
    return 0


def measure(options: argparse.Namespace, deadline: float) -> int:
    """One item after the other. Before each the file says which one it is."""
    made: dict[str, Any] = {"items": {}, "current": None}
    device = _device(options)
    clock, waiting = Clock(device), list(options.items)
    while waiting:
        item = waiting.pop(0)
        left = deadline - time.monotonic()
        if left < SHORTEST_TIMING:
            break
        made["current"] = item
        write(options.json, made)
        seconds = min(LONGEST_TIMING, max(SHORTEST_TIMING, 0.4 * left / (len(waiting) + 1)))
        if options.quick:
            seconds = 0.05
        made["items"][item] = attempt(item, options, device, clock, deadline, seconds)
        made["current"] = None
        write(options.json, made)
        print(f"{item}: done, {deadline - time.monotonic():.0f} s left", flush=True)
    return 0


def attempt(
    item: str, options: argparse.Namespace, device: torch.device, clock: Clock, deadline: float, seconds: float
) -> dict[str, Any]:
    """The item's result, or why there is none. An error after which the device is lost goes on to end the process."""
    try:
        if item == CEILINGS:
            return ceilings(clock, device, options.quick)
        if item == HOST:
            return host(options, device, clock)
        problem = make_problem(cases_of(options.quick)[item], device, _backend(options))
        return measure_case(problem, clock, deadline, seconds)
    except Exception as failure:
        traceback.print_exc()
        clock.synchronize()
        return {"reason": first_line(failure)}


def host(options: argparse.Namespace, device: torch.device, clock: Clock) -> dict[str, Any]:
    case = QUICK[0] if options.quick else SMALL
    problem = make_problem(case, device, _backend(options))
    with tf32(case.tf32):
        reference = make_references(problem)["DFA", True]
        return host_seconds(problem, reference, clock, 20 if options.quick else 1000)


def _device(options: argparse.Namespace) -> torch.device:
    """With an index, as tensors have it."""
    return torch.device("cuda", 0) if options.device == "cuda" else torch.device(options.device)


def _backend(options: argparse.Namespace) -> str:
    if options.backend:
        return str(options.backend)
    return "torch" if options.device == "cpu" else "auto"


def report(found: dict[str, Any]) -> str:
    """What was measured, as text."""
    items: dict[str, Any] = found["items"]
    lines = [f"ceilings: {items.get(CEILINGS)}", f"host, seconds a call: {items.get(HOST)}"]
    for name in [name for name in items if name not in (CEILINGS, HOST)]:
        lines += ["", name, *case_lines(name, items[name], items.get(CEILINGS, {}))]
    lines += [f"unfinished: {name}: {why}" for name, why in found["unfinished"].items()]
    return "\n".join(lines)


def case_lines(name: str, made: dict[str, Any], ceiling: dict[str, float]) -> list[str]:
    if "regions" not in made:
        return [f"  {made.get('reason', 'not measured')}"]
    limits = ", ".join(f"{region} {value:.2f}" for region, value in made["limits"].items())
    lines = [f"  the most that DFA's products allow over backpropagation's: {limits}"]
    for region, rows in {**made["regions"], "kernels, without forward and update": made["kernels"]}.items():
        lines += [f"  {region}", *(f"    {variant:<34}{cell(row)}" for variant, row in rows.items())]
    known = {case.name: case for case in (*CASES, *QUICK)}
    if name in known and "bytes" in ceiling:
        for what, least in floors(known[name], ceiling).items():
            lines.append(f"    {'floor by ' + what:<34}{least * 1e6:>12.1f} µs")
    return lines


def cell(row: dict[str, Any]) -> str:
    if "seconds" in row:
        changes = "  differs from run to run, within what is allowed" if row.get("repeats") is False else ""
        return f"{row['seconds'] * 1e6:>12.1f} µs{changes}"
    if "error" in row and not row["correct"]:
        return f"  {complaint(row)}"
    return f"  {row.get('reason', 'not timed')}"


if __name__ == "__main__":
    sys.exit(main())
