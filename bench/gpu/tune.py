"""Searches tile configs on the GPU here and rewrites its architecture's rows of configs.json.

    python -m bench.gpu.tune [--dry-run] [--budget SECONDS] [--arithmetic half tf32] [--kernel two_phase]

Every candidate is checked against float64 before it is timed; one that does not compile or does not fit is left out.
For each kernel and arithmetic the result is a list of at most three configs from large tiles to small, the one with
which a launch, which takes the first whose tiles fill the GPU, loses least over all workloads.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.clock import Clock
from bench.gpu.forced import Config, with_config
from bench.gpu.kernel_times import first_line
from bench.gpu.precision import tf32
from bench.gpu.processes import ROOT, environment, python
from bench.gpu.tuning_workloads import Workload, make_workload, problem_of, run_of, shapes_of
from dfa_kernels.backends.triton.configs import (
    ARITHMETICS,
    KINDS,
    DeltasConfig,
    GemmConfig,
    ProjectionConfig,
    StripConfig,
    TwoPhaseConfig,
    first_that_fills,
)
from dfa_kernels.backends.triton.launch import target_of

CONFIGS = ROOT / "dfa_kernels" / "backends" / "triton" / "configs.json"
LONGEST_LIST = 3
WARM_SHARE, WARM_START = 0.5, 20.0
"""Of the budget, for compiling; and seconds in which a process begins and ends."""
ROUNDS = 7
FINALISTS = 8
"""For each workload, how many of its fastest candidates may be on the list."""


@dataclass
class Search:
    """Seconds of each candidate on each workload; infinite where it does not run, or is wrong."""

    workloads: list[str]
    seconds: dict[Config, list[float]]
    tiles: dict[Config, list[int]]
    multiprocessors: int

    def chosen(self, configs: Sequence[Config], workload: int) -> Config:
        """The one that a launch takes from this list."""
        return configs[first_that_fills([self.tiles[c][workload] for c in configs], self.multiprocessors)]

    def loss(self, configs: Sequence[Config]) -> float:
        """Mean log of the time over the best time, with what launches would take from this list."""
        losses = []
        for i in range(len(self.workloads)):
            best = min(times[i] for times in self.seconds.values())
            losses.append(math.log(self.seconds[self.chosen(configs, i)][i] / best) if best < math.inf else 0.0)
        return statistics.mean(losses)

    def best_list(self) -> list[Config]:
        """From large tiles to small; of equally good lists, the shortest."""
        finalists = sorted({c for i in range(len(self.workloads)) for c in self._fastest(i)}, key=area, reverse=True)
        lists = (list(configs) for n in range(1, LONGEST_LIST + 1) for configs in itertools.combinations(finalists, n))
        return min(lists, key=lambda configs: (round(self.loss(configs), 3), len(configs)), default=[])

    def _fastest(self, workload: int) -> list[Config]:
        there = [c for c, times in self.seconds.items() if times[workload] < math.inf]
        return sorted(there, key=lambda c: self.seconds[c][workload])[:FINALISTS]


def area(config: Config) -> int:
    """Numbers in a tile of the result."""
    if isinstance(config, ProjectionConfig):
        return config.block_u * config.block_r
    return config.block_m * config.block_n


def main(argv: list[str] | None = None, clock: Clock | None = None) -> int:
    options = _parse(argv)
    if not torch.cuda.is_available() and options.device != "cpu":
        print("no CUDA device: nothing can be tuned here")
        return 1
    device = torch.device("cuda", 0) if options.device != "cpu" else torch.device("cpu")
    if options.warm:
        return warm(options, device)
    target = target_of(device)
    arch = f"sm_{target.capability}"
    rows = json.loads(options.configs.read_text())
    before = rows.get(arch, rows[_nearest(rows, target.capability)])
    end = time.monotonic() + options.budget
    warm_all(options)
    found = tune(options, clock or Clock(device), device, target.multiprocessors, before, end)
    for arithmetic, kernel in found:
        rows.setdefault(arch, copy.deepcopy(before))
        rows[arch][arithmetic][kernel] = [dataclasses.asdict(config) for config in found[arithmetic, kernel]]
    if options.dry_run:
        print(f"{options.configs.name} is left as it is")
    elif found:
        options.configs.write_text(as_text(rows))
        print(f"{arch} rewritten in {options.configs}")
    return 0 if found else 1


def _nearest(rows: dict[str, Any], capability: int) -> str:
    """The architecture whose rows are used for one that has none, as in `configs_for`."""
    known = sorted(int(arch.removeprefix("sm_")) for arch in rows)
    return f"sm_{max((arch for arch in known if arch <= capability), default=known[0])}"


def jobs_of(options: argparse.Namespace, end: float) -> Iterator[tuple[str, str, float]]:
    """(arithmetic, kernel, deadline) of all that is asked for; each gets an equal share of the time that is left."""
    jobs = list(itertools.product(options.arithmetic, options.kernel))
    for i, (arithmetic, kernel) in enumerate(jobs):
        now = time.monotonic()
        yield arithmetic, kernel, now + (end - now) / (len(jobs) - i)


def warm_all(options: argparse.Namespace) -> None:
    """Compiling takes far longer than timing, and one core. Several processes compile into Triton's cache first."""
    processes = options.processes if options.device == "cuda" else 0
    share = WARM_SHARE * options.budget
    flags = ["--budget", str(share), "--arithmetic", *options.arithmetic, "--kernel", *options.kernel]
    flags += ["--quick"] if options.quick else []
    commands = [python("bench.gpu.tune", "--warm", f"{i}/{processes}", *flags) for i in range(processes)]
    started = [subprocess.Popen(command, cwd=ROOT, env=environment()) for command in commands]
    deadline = time.monotonic() + share + WARM_START
    for process in started:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def warm(options: argparse.Namespace, device: torch.device) -> int:
    """Runs every N-th candidate once, in the order in which they will be timed; failures are told when timed."""
    index, parts = map(int, options.warm.split("/"))
    for arithmetic, kernel, deadline in jobs_of(options, time.monotonic() + options.budget):
        with tf32(arithmetic == "tf32"):
            runs = [run_of(kernel, problem_of(arithmetic, shape, device)) for shape in shapes_of(kernel, options.quick)]
            for config in itertools.islice(candidates(kernel, arithmetic), index, None, parts):
                if time.monotonic() > deadline:
                    break
                with contextlib.suppress(Exception), with_config(config):
                    for run in runs:
                        run()
    return 0


def tune(
    options: argparse.Namespace,
    clock: Clock,
    device: torch.device,
    multiprocessors: int,
    before: dict[str, Any],
    end: float,
) -> dict[tuple[str, str], list[Config]]:
    """A list for every kernel and arithmetic that is asked for, unless none of its configs runs."""
    found = {}
    for arithmetic, kernel, deadline in jobs_of(options, end):
        committed = [KINDS[kernel](**row) for row in before[arithmetic][kernel]]
        with tf32(arithmetic == "tf32"):
            workloads = [make_workload(kernel, arithmetic, s, device) for s in shapes_of(kernel, options.quick)]
            configs = list(dict.fromkeys([*committed, *candidates(kernel, arithmetic)]))
            made = search(configs, len(committed), workloads, clock, multiprocessors, deadline)
        best = made.best_list()
        if best:
            found[arithmetic, kernel] = usable_everywhere(best, committed)
        print(report(f"{arithmetic}, {kernel}", made, committed, best), flush=True)
    return found


def usable_everywhere(best: Sequence[Config], committed: Sequence[Config]) -> list[Config]:
    """Tiles as large as those that needed TMA before need it still; tensors that it cannot copy find one at the end.

    The workloads can all be copied, so they do not show what spills without it.
    """
    spared = [config for config in committed if not getattr(config, "needs_tma", False)]
    least = min((area(config) for config in committed if config not in spared), default=math.inf)
    marked = [
        dataclasses.replace(c, needs_tma=True) if isinstance(c, TwoPhaseConfig | GemmConfig) and area(c) >= least else c
        for c in best
    ]
    return marked if any(area(c) < least for c in best) else [*marked, *spared[:1]]


def search(
    configs: Sequence[Config],
    least: int,
    workloads: Sequence[Workload],
    clock: Clock,
    multiprocessors: int,
    deadline: float,
) -> Search:
    """The configs in their order, until the time is over; the first `least` in any case."""
    made = Search([workload.name for workload in workloads], {}, {}, multiprocessors)
    for config in configs:
        if time.monotonic() > deadline and len(made.seconds) >= least:
            break
        made.tiles[config] = [workload.tiles(config) for workload in workloads]
        made.seconds[config] = [attempt(config, workload, clock) for workload in workloads]
    return made


def attempt(config: Config, workload: Workload, clock: Clock) -> float:
    """Median seconds, or infinity for a config that cannot run here or gives a wrong result."""
    try:
        with with_config(config):
            found = workload.run()
            right = workload.is_right(found)
            # The next candidate's results lie in the same memory, and shall not be right because these were.
            for tensor in found:
                tensor.fill_(math.nan)
            if not right:
                print(f"{workload.name}: {config} is wrong", flush=True)
                return math.inf
            return statistics.median(clock.once(workload.run, waits_for_host=False) for _ in range(ROUNDS))
    except Exception as failure:
        print(f"{workload.name}: {config} does not run: {first_line(failure)}", flush=True)
        clock.synchronize()
        return math.inf


def candidates(kernel: str, arithmetic: str) -> Iterator[Config]:
    """Tiles worth trying, those first that are near to what usually wins."""
    if kernel == "deltas":
        yield from _deltas()
        return
    if kernel == "strip":
        yield from _strips(arithmetic)
        return
    small = arithmetic == "ieee"
    sides = (16, 32, 64) if small else (32, 64, 128, 256)
    depths = {"half": (64, 32, 128), "tf32": (32, 64, 16), "ieee": (16, 8, 32)}[arithmetic]
    tiles = [(m, n) for m in sides for n in sides if 1 / 4 <= m / n <= 4 and m * n <= (64 * 64 if small else 128 * 256)]
    for depth, stages in itertools.product(depths, (3, 4, 2)):
        for m, n in sorted(tiles, reverse=True, key=math.prod):
            for warps in (8, 4) if m * n > 32 * 64 else (4,):
                yield from _configs(kernel, m, n, depth, warps, stages, small)


def _deltas() -> Iterator[DeltasConfig]:
    """From 4 to 16 numbers to a thread."""
    for programs, warps, u, r in itertools.product((3, 2, 4, 1), (4, 8), (256, 128, 512, 64), (4, 8, 2, 16)):
        if 4 <= u * r // (32 * warps) <= 16:
            yield DeltasConfig(u, r, 16, warps, 1, programs)


def _strips(arithmetic: str) -> Iterator[Config]:
    """Products as deep as the batch, of no more rows than the workloads have."""
    tiles = ((64, 64), (128, 32), (32, 64), (64, 32), (128, 64), (64, 128), (32, 32), (128, 128))
    stages = (3, 2, 1) if arithmetic == "half" else (1,)
    for rows, warps, (m, n), depth in itertools.product((128, 64), (4, 8), tiles, stages):
        for programs in (2, 3, 1) if warps == 4 else (1,):
            yield StripConfig(m, n, rows, 256, warps, depth, programs)


def _configs(kernel: str, m: int, n: int, depth: int, warps: int, stages: int, small: bool) -> Iterator[Config]:
    if kernel == "project_taps":
        yield ProjectionConfig(m, n, depth, warps, stages)
    elif kernel == "grouped_gemm":
        for programs in (1, 2) if m * n <= 128 * 128 else (1,):
            yield GemmConfig(m, n, depth, 8, programs, warps, stages)
    else:
        u, e = (64, 16) if small else (128 if m >= 128 else 64, 32)
        for programs in (1, 2) if m * n <= 128 * 128 else (1,):
            yield TwoPhaseConfig(u, 32 if small else 64, e, m, n, depth, 8, programs, warps, stages)


def report(title: str, made: Search, before: Sequence[Config], after: Sequence[Config]) -> str:
    """Before and after, workload by workload."""
    lines = [f"{title}: {len(made.seconds)} candidates"]
    for i, workload in enumerate(made.workloads):
        if not after:
            lines.append(f"  {workload}: no candidate runs")
            continue
        old, new = (made.chosen(configs, i) for configs in (before, after))
        old_us, new_us = (made.seconds[config][i] * 1e6 for config in (old, new))
        best = min(times[i] for times in made.seconds.values()) * 1e6
        lines.append(f"  {workload}: before {old_us:.1f} µs, after {new_us:.1f} µs, best {best:.1f} µs, with {new}")
    return "\n".join(lines)


def as_text(rows: dict[str, Any]) -> str:
    """The table's own format: a line for each config."""
    blocks = []
    for arch in sorted(rows, key=lambda name: int(name.removeprefix("sm_"))):
        arithmetics = []
        for arithmetic, kernels in rows[arch].items():
            lists = [
                f'      "{kernel}": [\n' + ",\n".join(f"        {json.dumps(row)}" for row in configs) + "\n      ]"
                for kernel, configs in kernels.items()
            ]
            arithmetics.append(f'    "{arithmetic}": {{\n' + ",\n".join(lists) + "\n    }")
        blocks.append(f'  "{arch}": {{\n' + ",\n".join(arithmetics) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tune", description="Search tile configs on this GPU.")
    parser.add_argument("--dry-run", action="store_true", help="search and report, but leave configs.json alone")
    parser.add_argument("--budget", type=float, default=300.0, metavar="SECONDS", help="default %(default)s")
    parser.add_argument("--arithmetic", nargs="+", choices=ARITHMETICS, default=list(ARITHMETICS))
    parser.add_argument("--kernel", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="the file to rewrite")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: interpreted, to see it run")
    parser.add_argument("--quick", action="store_true", help="tiny workloads")
    cores = max(1, min(12, (os.cpu_count() or 2) - 2))
    parser.add_argument("--processes", type=int, default=cores, help="that compile beforehand, default %(default)s")
    parser.add_argument("--warm", metavar="I/N", help="only compile every N-th candidate, for its own processes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
