"""Which kernels a backward pass runs, counted by torch.profiler: one, or two of a wide network, with SGD too."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.cases import CASES, LARGE, SMALL, Case, Problem, make_problem
from bench.gpu.graphs import Work
from bench.gpu.kernel_times import first_line
from bench.gpu.precision import tf32
from bench.gpu.processes import step_parser, write
from bench.gpu.regions import BACKWARD, BP, EVERYWHERE, OURS, REGIONS, STEP, UPDATE

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""The categories of what a device does, in the profiler's trace."""
OUR_KERNELS = ("strip", "two_phase", "deltas", "grouped_gemm", "dfa_")
PROFILED = (SMALL, next(case for case in CASES if case.classes == 1000 and case.hidden == 4096), LARGE)


@dataclass(frozen=True)
class Counted:
    """What ran on the device in one call."""

    names: tuple[str, ...]

    @property
    def are_ours(self) -> bool:
        return bool(self.names) and all(name.startswith(OUR_KERNELS) for name in self.names)


def main(argv: list[str] | None = None) -> int:
    options = step_parser(__doc__ or "").parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was counted")
        return 1
    found: dict[str, Any] = {}
    for case in PROFILED[: 1 if options.quick else None]:
        try:
            found[case.name] = count_case(make_problem(case, torch.device("cuda", 0), "auto"))
        except Exception as failure:
            traceback.print_exc()
            found[case.name] = {"reason": first_line(failure)}
        write(options.json, found)
        print("\n".join(lines(case, found[case.name])), flush=True)
        torch.cuda.empty_cache()
    return 0 if all("reason" not in made for made in found.values()) else 1


def count_case(problem: Problem) -> dict[str, Any]:
    """Names of what runs on the device, by region, for this project and for backpropagation; and the plan."""
    found: dict[str, Any] = {}
    with tf32(problem.case.tf32):
        for variant in (OURS, BP):
            regions = EVERYWHERE[variant](problem, 1e-4)
            found[variant] = {name: device_activities(regions[name].run, regions[name].prepare) for name in REGIONS}
        ours = found[OURS]
        found["backward is by our kernels"] = Counted(tuple(ours[BACKWARD])).are_ours
        found["backward and SGD are by our kernels"] = Counted(tuple(ours[UPDATE])).are_ours
    return found


def device_activities(run: Work, prepare: Work, profiled: Callable[[Work], list[str]] | None = None) -> list[str]:
    """What the device does in one warm call, in order. The loss is not part of it if `run` begins with an error."""
    profiled = profiled or traced
    for _ in range(3):
        prepare()
        run()
    # The first use of the profiler sets it up, and may miss what runs meanwhile.
    for _ in range(2):
        prepare()
        torch.cuda.synchronize()
        names = profiled(run)
    return names


def traced(run: Work) -> list[str]:
    """Names from the profiler's trace, whose categories tell the device's work from the annotations beside it."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return names_in_trace(json.loads(path.read_text()))


def names_in_trace(trace: dict[str, Any]) -> list[str]:
    events = [event for event in trace["traceEvents"] if event.get("cat") in ON_DEVICE]
    return [str(event["name"]) for event in sorted(events, key=lambda event: float(event["ts"]))]


def lines(case: Case, made: dict[str, Any]) -> list[str]:
    if "reason" in made:
        return [f"{case.name}: {made['reason']}"]
    found = [case.name]
    for variant in (OURS, BP):
        for region in (BACKWARD, UPDATE, STEP):
            names = made[variant][region]
            found.append(f"  {variant}, {region}: {len(names)}: {', '.join(name[:60] for name in names)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
