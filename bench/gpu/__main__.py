"""Everything there is to see on a GPU, in under eight minutes, from a plain checkout:

    python -m bench.gpu OUT [--steps library,tests,sanitizer,profile,time] [--quick]

Writes OUT/results.json, OUT/summary.md and OUT/<step>.log, and keeps the first two up to date while it runs. The exit
status says whether every step ran to its end without an error; what must be reached is in the summary.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from bench.gpu import summary
from bench.gpu.processes import Outcome, Step, python, read, run_step, write

STEPS = (
    Step("env", "bench.gpu.device_facts", 20),
    Step("library", "bench.gpu.cuda_library", 35),
    Step("tests", "bench.gpu.sharded_tests", 135),
    Step("sanitizer", "bench.gpu.sanitizer", 70),
    Step("profile", "bench.gpu.kernel_counts", 40),
    Step("time", "bench.gpu.timing", 150),
)
EXTRA = 4.0
"""Seconds that a step may overrun the limit it was told before it is ended from outside."""


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _stop)
    found: dict[str, Any] = {"steps": [], "quick": options.quick}
    outcomes: list[Outcome] = []
    try:
        for step in options.steps:
            print(f"{step.name}: at most {step.limit:.0f} s, {options.out / step.name}.log", flush=True)
            outcomes.append(one_step(step, options, found))
            found["steps"] = [dataclasses.asdict(outcome) for outcome in outcomes]
            write_all(options.out, found)
            print(f"{step.name}: {outcomes[-1].status} after {outcomes[-1].seconds:.0f} s", flush=True)
    finally:
        write_all(options.out, found)
    print((options.out / "summary.md").read_text())
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


def one_step(step: Step, options: argparse.Namespace, found: dict[str, Any]) -> Outcome:
    """Runs it, with what it has found so far in OUT all the while."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.json"
        seen = 0.0

        def collect() -> None:
            nonlocal seen
            changed = path.stat().st_mtime if path.exists() else 0.0
            if changed > seen:
                seen = changed
                keep(step, read(path), options, found)
                write_all(options.out, found)

        arguments = ["--json", str(path), "--limit", str(step.limit), *(["--quick"] if options.quick else [])]
        command = python(step.module, *arguments)
        try:
            return run_step(step.name, command, options.out / f"{step.name}.log", step.limit + EXTRA, collect)
        finally:
            collect()


def keep(step: Step, made: Any, options: argparse.Namespace, found: dict[str, Any]) -> None:
    if step.name != "env":
        found[step.name] = made
        return
    if made and options.commit:
        made |= {"commit": options.commit, "dirty": options.dirty}
    found["environment"] = made


def write_all(out: Path, found: dict[str, Any]) -> None:
    found["requirements"] = [dataclasses.asdict(verdict) for verdict in summary.verdicts(found)]
    write(out / "results.json", found)
    part = out / "summary.md.part"
    part.write_text(summary.markdown(found))
    part.replace(out / "summary.md")


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def parse(argv: list[str] | None) -> argparse.Namespace:
    known = {step.name: step for step in STEPS}
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Tests, checks and times on a GPU.")
    parser.add_argument("out", type=lambda text: Path(text).resolve(), metavar="OUT", help="directory, made if absent")
    parser.add_argument("--steps", default=",".join(known), help="some of %(default)s; env always comes first")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--dirty", action="store_true", help="with --commit: there are changes beside it")
    options = parser.parse_args(argv)
    names = options.steps.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--steps: got {unknown}, expected some of {list(known)}")
    options.steps = [step for step in STEPS if step.name == "env" or step.name in names]
    return options


if __name__ == "__main__":
    began = time.monotonic()
    status = main()
    print(f"{time.monotonic() - began:.0f} s in all")
    sys.exit(status)
